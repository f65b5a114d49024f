"""kill -9 of the server, between answers and during one: no acknowledged vote is lost and none is doubled."""

import json
import signal
import threading
import time
import urllib.error
import urllib.request

import pytest
from study_cases import ServerProcess, make_evaluation

from hgdpo_core.config.study import StudyConfig
from hgdpo_core.storage import Store
from hgdpo_core.study.create import create_study
from hgdpo_core.study.log import segments
from hgdpo_core.study.session import StudySession
from hgdpo_core.study.study import log_folder
from hgdpo_core.study.votes import read_votes


class Visitor(threading.Thread):
    """Answers as fast as it is let, sending each answer until it is acknowledged, over all restarts."""

    def __init__(self, url, stop):
        super().__init__(daemon=True)
        self.url, self.stop, self.acknowledged, self.unsure = url, stop, {}, {}

    def run(self):
        state = self.ask("/api/join", {"consent": True})
        self.cookie = self.set_cookie.partition(";")[0]
        while state is not None and state["current"] is not None and not self.stop.is_set():
            trial = state["current"]
            choice = ("left", "right", "tie")[len(self.acknowledged) % 3]
            self.unsure[trial["trial"]] = choice
            state = self.ask("/api/answer", {"trial": trial["trial"], "choice": choice, "revision": 0, "ms": 5})
            if state is not None:
                self.acknowledged[trial["trial"]] = choice
            time.sleep(0.005)

    def ask(self, path, body):
        headers = {"Content-Type": "application/json", "Origin": self.url, "Cookie": getattr(self, "cookie", "")}
        while not self.stop.is_set():
            try:
                request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=10) as response:
                    self.set_cookie = response.headers["Set-Cookie"] or ""
                    return json.load(response)
            except urllib.error.HTTPError as error:
                assert error.code in (429, 503), error.read()
                time.sleep(0.05)
            except (OSError, ValueError):  # killed, or not there yet
                time.sleep(0.02)
        return None


def kill_and_count(tmp_path, kills):
    """Kill the server so often while people answer; then count the acknowledged and the stored answers."""
    prompts = [f"a nun, number {i}" for i in range(60)]
    store = Store(str(tmp_path / "root"))
    make_evaluation(store, "60-k", prompts=prompts)
    config = StudyConfig.model_validate({"sources": ("60-k",), "pairs": 60, "people": 50, "questions": 60})
    study = create_study(store, config).study
    server, stop = ServerProcess(study), threading.Event()
    visitors = [Visitor(server.url, stop) for _ in range(3)]
    for visitor in visitors:
        visitor.start()
    for number in range(kills):
        time.sleep(0.15 + 0.37 * (number % 5) / 5)
        server.end(signal.SIGKILL)
        server.start()
        visitors += [Visitor(server.url, stop)] if number % 4 == 3 else []
        if not visitors[-1].is_alive():
            visitors[-1].start()
    time.sleep(0.5)
    stop.set()
    for visitor in visitors:
        visitor.join(20)
    server.end(signal.SIGKILL)
    StudySession(study, log_folder(study)).close()  # a start and an orderly end: all votes go to the store
    rows = read_votes(study.store, study.id).to_pylist()
    stored = {row["trial"]: row["choice"] for row in rows}
    acknowledged = {trial: choice for visitor in visitors for trial, choice in visitor.acknowledged.items()}
    sent = {trial: choice for visitor in visitors for trial, choice in visitor.unsure.items()}
    assert len(rows) == len(stored), "none is doubled"
    assert acknowledged.items() <= stored.items() <= sent.items(), "none is lost or made up"
    assert len(acknowledged) >= 5 * kills
    assert segments(log_folder(study)) == []
    return len(acknowledged), len(stored)


def test_kill_9_loses_and_doubles_nothing(tmp_path):
    kill_and_count(tmp_path, 2)


@pytest.mark.slow
def test_kill_9_twenty_times(tmp_path, record_property):
    record_property("acknowledged and stored", kill_and_count(tmp_path, 20))
