"""The page's server: what it answers, what it hides, what it refuses, and that refusals leave no trace."""

import io
import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from study_cases import answer, free_port, join, make_study, served

from hgdpo_core.errors import ConfigError, StorageError
from hgdpo_core.storage.shards import read_table
from hgdpo_core.study.limits import RateLimit, RefusedRequestError
from hgdpo_core.study.server import STATIC, serve_study
from hgdpo_core.study.study import log_folder
from hgdpo_core.study.votes import list_participants, read_votes

ORIGIN = "http://127.0.0.1:8321"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root whose study is made once; each test has its own copy of nothing else than participants."""
    return str(tmp_path_factory.mktemp("study") / "root")


@pytest.fixture
def study(root, request):
    seed = sum(request.node.name.encode())
    return make_study(root, seed=seed)


@pytest.fixture
def client(study, tmp_path):
    with served(study, tmp_path / "images") as client:
        yield client


def votes(client):
    """What is stored, after all is moved."""
    session = client.app.state.server.session
    session.move()
    return read_votes(session.study.store, session.study.id).to_pylist()


def another(client) -> TestClient:
    """Another browser."""
    other = TestClient(client.app, base_url=ORIGIN)
    other.headers["Origin"] = ORIGIN
    return other


# -- what it answers


def test_a_whole_study(client, study):
    before = client.get("/api/state").json()
    assert before == {"question": "Which image looks more natural?", "forced_choice": False, "joined": False,
                      "needs_access_code": False, "questions": 14, "minutes": 1}
    state = join(client)
    assert (state["done"], state["total"], state["previous"]) == (0, 14, None)
    for number in range(14):
        assert state["done"] == number and state["current"]["choice"] is None
        for side in ("left", "right"):
            image = client.get(f"/images/{state['current']['trial']}/{side}")
            assert Image.open(io.BytesIO(image.content)).format == "WEBP"
        state = answer(client, state["current"], ("left", "right", "tie")[number % 3]).json()
    assert state["current"] is None and state["next"] is None and state["done"] == 14
    rows = votes(client)
    assert [row["choice"] for row in rows] == [("left", "right", "tie")[number % 3] for number in range(14)]
    assert all(row["ms"] == 900 for row in rows)


def test_the_images_are_those_of_the_sides_that_are_stored(client, study):
    stored = {row["pair"]: row for row in read_table(study.store, f"{study.key}/pairs.parquet").to_pylist()}
    state, seen = join(client), {}
    while state["current"]:
        seen[state["current"]["trial"]] = [client.get(f"/images/{state['current']['trial']}/{side}").content
                                           for side in ("left", "right")]
        state = answer(client, state["current"]).json()
    for row in votes(client):
        pair = stored[row["pair"]]
        images = {pair["first"]: pair["first_image"], pair["second"]: pair["second_image"]}
        if row["kind"] == "check":
            picture = seen[row["trial"]][0 if row["left"] == "picture" else 1]
            assert picture in images.values() and seen[row["trial"]][0] != seen[row["trial"]][1]
        else:
            assert seen[row["trial"]] == [images[row["left"]], images[row["right"]]]


def test_reload_link_and_back(client):
    state = answer(client, join(client)["current"], "left").json()
    assert client.get("/api/state").json() == state, "a reload shows the same"
    other = another(client)
    assert other.post("/api/resume", json={"code": state["code"]}).json() == state
    corrected = answer(other, state["previous"], "right").json()
    assert corrected["current"] == state["current"] and corrected["previous"]["choice"] == "right"
    assert join(client)["done"] == 1, "to join again is a no-op"
    assert [row["choice"] for row in votes(client)] == ["right"]


def test_two_tabs_and_lost_replies_double_nothing(client):
    first = join(client)["current"]
    states = [answer(client, first, choice) for choice in ("left", "right", "left")]
    assert [response.status_code for response in states] == [200] * 3
    assert all(response.json() == states[0].json() for response in states)
    second = states[0].json()["current"]
    answer(client, second, "tie")
    late = answer(client, {**first, "revision": 1}, "right")
    assert late.status_code == 409 and [row["choice"] for row in votes(client)] == ["left", "tie"]


def test_two_people_answer_their_own_questions(client):
    other = another(client)
    one, two = join(client), join(other)
    assert one["code"] != two["code"] and one["current"]["trial"] != two["current"]["trial"]
    answer(client, one["current"])
    assert other.get("/api/state").json()["done"] == 0
    assert len({row["participant"] for row in votes(client)}) == 1


def test_forced_choice(root, tmp_path):
    with served(make_study(root, forced_choice=True), tmp_path / "images") as client:
        state = join(client)
        assert state["forced_choice"] and answer(client, state["current"], "tie").status_code == 422
        assert answer(client, state["current"], "right").status_code == 200


def test_a_full_study_says_so(root, tmp_path):
    with served(make_study(root, people=1), tmp_path / "images") as client:
        join(client)
        refused = another(client).post("/api/join", json={"consent": True})
        assert refused.status_code == 409 and "all the people it needs" in refused.json()["error"]


def test_the_access_code(study, tmp_path):
    with served(study, tmp_path / "images", access_code="open sesame") as client:
        assert client.get("/api/state").json()["needs_access_code"]
        for body in ({}, {"access_code": "open"}, {"access_code": "öpen sesame"}):
            assert client.post("/api/join", json={"consent": True, **body}).status_code == 403
        assert list_participants(study.store, study.id) == []
        for _ in range(40):
            refused = client.post("/api/join", json={"consent": True, "access_code": "guess"})
        assert refused.status_code == 429
        code = join(client, access_code="open sesame")["code"]
        assert another(client).post("/api/resume", json={"code": code}).status_code == 200


def test_withdrawing_deletes_all_and_the_code_is_void(client, study):
    state = answer(client, join(client)["current"]).json()
    assert len(votes(client)) == 1
    response = client.post("/api/withdraw", json={"withdraw": True})
    assert response.status_code == 200 and not response.json()["joined"]
    assert votes(client) == [] and list_participants(study.store, study.id) == []
    assert another(client).post("/api/resume", json={"code": state["code"]}).status_code == 403
    assert answer(client, state["current"]).status_code == 401


def test_an_answer_that_cannot_be_stored_is_not_acknowledged(client, monkeypatch):
    state = join(client)
    log = client.app.state.server.session.log
    with monkeypatch.context() as patch:
        patch.setattr(log, "append", lambda record: _failed())
        assert answer(client, state["current"]).status_code == 503
    assert answer(client, state["current"]).json()["done"] == 1


def _failed():
    from concurrent.futures import Future

    future = Future()
    future.set_exception(StorageError("cannot keep votes in a folder of the server: no space left"))
    return future


# -- what it hides


def test_nothing_gives_models_pairs_or_kinds_away(client, study):
    """Neither by bodies nor by headers, whatever a participant asks for."""
    texts, state, headers = [client.get(path).text for path in ("/", "/study.js", "/study.css")], join(client), []
    while state["current"]:
        for side in ("left", "right"):
            image = client.get(f"/images/{state['current']['trial']}/{side}")
            headers.append({name: value for name, value in image.headers.items() if name != "content-length"})
        response = answer(client, state["current"])
        texts.append(response.text)
        state = response.json()
    everything = " ".join(texts)
    hidden = {study.id, *study.models, "repeat", "noise", "picture", "check", *(pair.pair for pair in study.pairs),
              *(pair.prompt_id for pair in study.pairs)}
    found = {word for word in hidden if re.search(rf'"{re.escape(word)}"', everything.split("</html>")[-1])}
    assert not found and not {pair.pair for pair in study.pairs} & set(re.findall(r"[0-9a-f]{32}", everything))
    assert len({json.dumps(header) for header in headers}) == 1, "the same for all images"
    assert not {"etag", "last-modified", "server"} & headers[0].keys()


def test_headers_and_cookie(client):
    for path in ("/", "/api/state", "/study.js", "/nothing", "/images/x/left"):
        response = client.get(path)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "data:" not in policy
        assert response.headers["x-content-type-options"] == "nosniff" and "server" not in response.headers
    response = client.post("/api/join", json={"consent": True})
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
    assert len(response.json()["code"]) == 22, "128 bits"


def test_the_page_loads_nothing_from_elsewhere_and_has_no_inline_script():
    page = (STATIC / "index.html").read_text()
    assert re.findall(r"<script[^>]*>", page) == ['<script src="study.js" defer>'] and "</script>" in page
    assert not re.search(r"\son[a-z]+=|\sstyle=|<style", page)
    script = (STATIC / "study.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?:", script)
    assert not re.search(r"https?:|@import|url\(", (STATIC / "study.css").read_text())


def test_no_name_and_no_address_is_stored(client, study):
    answer(client, join(client)["current"])
    votes(client)
    stored = b"".join(study.store.read_bytes(key) for key, _, _ in study.store.walk(f"{study.key}/participants"))
    assert json.loads(stored).keys() == {"number", "joined"}
    for path in [*Path(log_folder(study)).iterdir()]:
        assert b"127.0.0.1" not in path.read_bytes() and b"testclient" not in path.read_bytes()


# -- what it refuses


def abuses(mine, other, stale, future):
    """Name -> (method, path, keywords): each must be refused. `mine`, `other`: trials; `stale`: an answered one."""
    good = {"trial": mine, "choice": "left", "revision": 0, "ms": 5}
    post = "POST", "/api/answer"

    def body(**changes):
        return {"json": {**good, **changes}}

    def raw(content, kind="application/json"):
        return {"content": content, "headers": {"Content-Type": kind}}

    return {
        "other people's trial": (*post, body(trial=other)),
        "unknown trial": (*post, body(trial="0" * 32)),
        "later trial": (*post, body(trial=future)),
        "skipped correction": (*post, body(trial=mine, revision=1)),
        "correction of an older answer": (*post, body(trial=stale, revision=1)),
        "path as trial": (*post, body(trial="../../etc/passwd")),
        "HTML as trial": (*post, body(trial="<script>alert(1)</script>")),
        "trial in capitals": (*post, body(trial=mine.upper())),
        "trial with a line break": (*post, body(trial=mine + "\n")),
        "no trial": (*post, {"json": {name: value for name, value in good.items() if name != "trial"}}),
        "trial as list": (*post, body(trial=[mine])),
        "other choice": (*post, body(choice="both")),
        "HTML as choice": (*post, body(choice="<img src=x onerror=alert(1)>")),
        "choice as number": (*post, body(choice=1)),
        "choice as null": (*post, body(choice=None)),
        "negative time": (*post, body(ms=-1)),
        "time of a year": (*post, body(ms=31_536_000_000)),
        "time as text": (*post, body(ms="5")),
        "time as truth": (*post, body(ms=True)),
        "broken time": (*post, body(ms=1.5)),
        "negative revision": (*post, body(revision=-1)),
        "huge revision": (*post, body(revision=10 ** 30)),
        "HTML in a name": (*post, body(name="<b onclick=alert(1)>Eve</b>")),
        "participant in the body": (*post, body(participant="0" * 32)),
        "own kind": (*post, body(kind="check")),
        "a list": (*post, {"json": [good]}),
        "text": (*post, {"json": "left"}),
        "no body": (*post, raw(b"")),
        "broken JSON": (*post, raw(b'{"trial": ')),
        "NaN": (*post, raw(json.dumps(good).replace("5}", "NaN}").encode())),
        "deep JSON": (*post, raw(b"[" * 4000)),
        "no UTF-8": (*post, raw(b'{"trial": "\xff\xfe"}')),
        "oversize": (*post, raw(json.dumps({**good, "name": "x" * 5000}).encode())),
        "oversize in chunks": (*post, {"content": iter([b"x" * 1000] * 9),
                                       "headers": {"Content-Type": "application/json"}}),
        "form": (*post, raw(b"trial=1&choice=left", "application/x-www-form-urlencoded")),
        "plain text": (*post, raw(json.dumps(good).encode(), "text/plain")),
        "no type": (*post, {"content": json.dumps(good).encode()}),
        "foreign origin": (*post, {**body(), "headers": {"Origin": "https://evil.example"}}),
        "origin null": (*post, {**body(), "headers": {"Origin": "null"}}),
        "origin of another port": (*post, {**body(), "headers": {"Origin": "http://127.0.0.1:1"}}),
        "origin with a suffix": (*post, {**body(), "headers": {"Origin": ORIGIN + ".evil.example"}}),
        "no origin": (*post, {**body(), "headers": {"Origin": ""}}),
        "foreign host": (*post, {**body(), "headers": {"Host": "evil.example", "Origin": "http://evil.example"}}),
        "no cookie": (*post, {**body(), "headers": {"Cookie": ""}}),
        "forged cookie": (*post, {**body(), "headers": {"Cookie": "study-000000000000=" + "A" * 22}}),
        "GET of answers": ("GET", "/api/answer", {}),
        "PUT": ("PUT", "/api/answer", body()),
        "DELETE": ("DELETE", "/api/answer", {}),
        "GET of a join": ("GET", "/api/join", {}),
        "GET of a withdrawal": ("GET", "/api/withdraw", {}),
        "POST of the state": ("POST", "/api/state", {"json": {}}),
        "join without consent": ("POST", "/api/join", {"json": {"consent": False}}),
        "join with a name": ("POST", "/api/join", {"json": {"consent": True, "name": "<script>"}}),
        "withdrawal without saying so": ("POST", "/api/withdraw", {"json": {}}),
        "withdrawal of another": ("POST", "/api/withdraw", {"json": {"withdraw": True, "participant": "0" * 32}}),
        "resume with a forged code": ("POST", "/api/resume", {"json": {"code": "A" * 22}}),
        "resume with a participant's hash": ("POST", "/api/resume", {"json": {"code": "0" * 32}}),
        "resume with a path": ("POST", "/api/resume", {"json": {"code": "../" * 20}}),
        "resume from a foreign site": ("POST", "/api/resume", {"json": {"code": "A"},
                                                                "headers": {"Origin": "https://evil.example"}}),
        "image of another": ("GET", f"/images/{other}/left", {}),
        "later image": ("GET", f"/images/{future}/left", {}),
        "third image": ("GET", f"/images/{mine}/middle", {}),
        "image by a path": ("GET", "/images/..%2f..%2fpairs.parquet/left", {}),
        "image without a cookie": ("GET", f"/images/{mine}/left", {"headers": {"Cookie": ""}}),
        "path traversal": ("GET", "/../../etc/passwd", {}),
        "encoded traversal": ("GET", "/%2e%2e/%2e%2e/etc/passwd", {}),
        "source of the server": ("GET", "/server.py", {}),
        "votes": ("GET", "/votes", {}),
        "configuration": ("GET", "/config.json", {}),
        "documentation of the API": ("GET", "/openapi.json", {}),
        "docs": ("GET", "/docs", {}),
    }


def test_abuse_is_refused_and_leaves_no_trace(client, study):
    server = client.app.state.server
    server.answers = RateLimit(1000, 1000)
    state = answer(client, answer(client, join(client)["current"]).json()["current"], "right").json()
    other = join(another(client))["current"]["trial"]
    session = server.session
    me = session.find(state["code"])
    stale, future = session.trial_id(me, 0), session.trial_id(me, 4)
    listed = abuses(state["current"]["trial"], other, stale, future)
    rows, people = votes(client), list_participants(study.store, study.id)
    files = {key: size for key, size, _ in study.store.walk(study.key)}
    assert len(listed) >= 40 and len(rows) == 2
    statuses = {}
    for name, (method, path, keywords) in listed.items():
        response = client.request(method, path, **keywords)
        statuses[name] = response.status_code
        assert 400 <= response.status_code < 500, (name, response.status_code, response.text)
        assert response.json().keys() == {"error"} and "\n" not in response.json()["error"], name
        assert "Traceback" not in response.text and str(study.store.root) not in response.text, name
    assert votes(client) == rows and list_participants(study.store, study.id) == people
    assert {key: size for key, size, _ in study.store.walk(study.key)} == files
    assert client.get("/api/state").json() == state
    expected = {"oversize": 413, "oversize in chunks": 413, "form": 415, "no type": 415, "PUT": 405,
                "foreign origin": 403, "no cookie": 401, "forged cookie": 401, "other people's trial": 404,
                "later trial": 404, "correction of an older answer": 409, "broken JSON": 400, "foreign host": 400}
    assert {name: statuses[name] for name in expected} == expected


def test_rates_count_participants_and_not_addresses(client):
    client.app.state.server.answers = RateLimit(5, 20, clock=lambda: 0.0)
    other = another(client)
    mine, others = join(client)["current"], join(other)["current"]
    statuses = [answer(client, mine).status_code for _ in range(40)]
    assert statuses == [200] * 20 + [429] * 20
    assert answer(other, others).status_code == 200, "from the same address"
    assert len(votes(client)) == 2


def test_a_rate_recovers_and_idle_names_are_forgotten():
    now = [0.0]
    limit = RateLimit(2, 4, clock=lambda: now[0])
    for _ in range(4):
        limit.take("a")
    with pytest.raises(RefusedRequestError):
        limit.take("a")
    now[0] = 0.6
    limit.take("a")
    with pytest.raises(RefusedRequestError):
        limit.take("a")
    now[0] = 100
    for number in range(10_001):
        limit.take(str(number))
    now[0] = 200
    limit.take("last")
    assert len(limit._left) == 1


# -- the process


def test_a_taken_port_and_a_short_access_code_are_named(study, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", free_port())) as taken, pytest.raises(ConfigError, match="--port"):
        serve_study(study, tmp_path / "log", port=taken.getsockname()[1])
    with pytest.raises(ConfigError, match="has 3 characters: expected at least 6"):
        serve_study(study, tmp_path / "log", access_code="abc")
