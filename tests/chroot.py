"""The steps of a Dockerfile in fresh Debian root file systems, where no container can run: debootstrap and chroot."""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
ROOT = Path(__file__).parents[1]
CERTIFICATES = "/etc/ssl/host-certificates.crt"  # of this machine: a proxy between it and PyPI may have its own
MOUNTS = ("/dev", "/opt/wheels")  # as here, where they exist
IGNORED = {"HEALTHCHECK", "CMD"}


def why_not() -> str | None:
    """The reason why it cannot work here; None where it can."""
    if os.geteuid() != 0:
        return "chroot needs root"
    if shutil.which("debootstrap") is None:
        return "no debootstrap here: apt-get install debootstrap"
    return None


@dataclass
class Stage:
    """A root file system and what the Dockerfile set in it."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    folder: str = "/"

    def command(self, script: str) -> list[str]:
        """What runs a script in it, with the mounts of this process alone."""
        own = {"HOME": "/root" if self.user == "root" else f"/home/{self.user}",
               "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive",
               "PIP_CERT": CERTIFICATES, "SSL_CERT_FILE": CERTIFICATES, "PIP_DISABLE_PIP_VERSION_CHECK": "1",
               "PIP_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")} | self.environment
        mounts = [f"mount --rbind {path} {self.root}{path}" for path in MOUNTS if Path(path).exists()]
        inside = ["chroot", f"--userspec={self.user}:{self.user}", str(self.root), "env", "-i",
                  *(f"{name}={value}" for name, value in own.items()), "sh", "-ec", f"cd {self.folder}\n{script}"]
        lines = [*mounts, f"mount -t proc proc {self.root}/proc", f"exec {shlex.join(inside)}"]
        return ["unshare", "--mount", "sh", "-ec", "\n".join(lines)]

    def run(self, script: str) -> str:
        """Its output; AssertionError with the end of it when it fails."""
        done = subprocess.run(self.command(script), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, f"{script}\n{done.stdout[-4000:]}"
        return done.stdout


def bootstrap(root: Path) -> None:
    """A minimal Debian that reaches the network as this machine does."""
    subprocess.run(["debootstrap", "--variant=minbase", SUITE, str(root), MIRROR], check=True, capture_output=True)
    shutil.copy("/etc/resolv.conf", root / "etc" / "resolv.conf")
    bundle = os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    (root / CERTIFICATES[1:]).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(bundle, root / CERTIFICATES[1:])
    for path in MOUNTS:
        (root / path[1:]).mkdir(parents=True, exist_ok=True)


def build(folder: Path, arguments: dict[str, str]) -> Stage:
    """Run the steps of the repository's Dockerfile below `folder`; returns the last stage."""
    bootstrap(folder / "base")
    stages: dict[str, Stage] = {}
    stage = Stage(folder)
    for word, rest in instructions((ROOT / "Dockerfile").read_text()):
        if word == "FROM":
            name = rest.split()[-1]
            subprocess.run(["cp", "-a", str(folder / "base"), str(folder / name)], check=True)
            stage = stages[name] = Stage(folder / name)
        elif word == "ARG":
            name, _, default = rest.partition("=")
            stage.environment[name] = arguments.get(name, default)
        elif word == "ENV":
            stage.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "RUN":
            stage.run(rest)
        elif word == "COPY":
            _copy(stage, stages, shlex.split(rest))
        elif word == "USER":
            stage.user = rest
        elif word == "WORKDIR":
            stage.folder = rest
            (stage.root / rest[1:]).mkdir(parents=True, exist_ok=True)
        else:
            assert word in IGNORED, f"this test does not know {word}"
    return stage


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(word, rest) of each instruction, continued lines joined, without comments."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined)]


def _copy(stage: Stage, stages: dict[str, Stage], words: list[str]) -> None:
    *options, source, to = words
    target = stage.root / to[1:]
    if options:
        earlier = stages[options[0].removeprefix("--from=")]
        subprocess.run(["cp", "-a", f"{earlier.root}{source}", str(target)], check=True)
        return
    names = _context() if source == "." else [source]
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)


def _context() -> list[str]:
    """What .dockerignore, which leaves everything out, lets in again."""
    first, *others = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    return [line[1:] for line in others if line.startswith("!")]
