# The image of workers, of runs on Kubernetes and of a server; none of it needs root.
#     docker build -t hgdpo .
#     docker build -t hgdpo-cpu --build-arg BASE=debian --build-arg TAG=12-slim \
#         --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# BASE and TAG: Debian 12 or Ubuntu 24.04, with or without CUDA; torch's own wheels bring most of CUDA along.
# tests/orchestration/test_image.py runs these steps in a fresh Debian: it knows ARG, ENV, RUN, COPY, USER, WORKDIR.
ARG BASE=nvidia/cuda
ARG TAG=12.8.1-runtime-ubuntu24.04

FROM ${BASE}:${TAG} AS build
ARG TORCH_INDEX=
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt /src/
# Torch first: a change of the code does not download it again. PIP_* of the build come from --build-arg, for a mirror.
RUN python3 -m venv /opt/hgdpo \
    && /opt/hgdpo/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch
COPY . /src/
RUN /opt/hgdpo/bin/pip install --no-cache-dir -c constraints.txt ".[containers]"

FROM ${BASE}:${TAG} AS run
# For sampler.compile: --build-arg PACKAGES="gcc libc6-dev python3-dev"
ARG PACKAGES=
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 ${PACKAGES} \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 hgdpo
COPY --from=build /opt/hgdpo /opt/hgdpo
ENV PATH=/opt/hgdpo/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1 PREFECT_WORKER_WEBSERVER_PORT=8080
USER hgdpo
WORKDIR /home/hgdpo
RUN mkdir .cache && python -m deployments.files
# Of a worker, the default command below. Kubernetes and compose.yaml have their own.
HEALTHCHECK --interval=30s --timeout=5s --retries=5 CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health')"]
ENV HGDPO_POOL=hgdpo-gpu
CMD ["sh", "-c", "exec prefect worker start --type process --pool \"$HGDPO_POOL\" --limit 1 --name \"worker@$(hostname)\" --with-healthcheck"]
