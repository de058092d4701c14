"""The verb ``review``: what it reads, scores, keeps and serves."""

import asyncio
import json

import httpx
import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from cli.tiny_files import rows, written
from latentguard.guard.latent_guard import LatentGuard
from latentguard.review.local import LocalServer

AUDIT = dict(request="req-1", client="-", endpoint="score", action="score", time="t", score=0.5)


@pytest.fixture
def review(lg, guard, tmp_path, monkeypatch):
    """Run the verb, and a function instead of the server, which is given an address and a key."""
    out = tmp_path / "labels" / "labels.jsonl"

    def run(source, use, *words):
        def serve(server):
            async def ask():
                transport = httpx.ASGITransport(app=server.server.config.app)
                headers = {"authorization": f"Bearer {server.token}"}
                base = f"http://127.0.0.1:{server.port}"
                how = dict(transport=transport, headers=headers, base_url=base)
                async with httpx.AsyncClient(**how) as client:
                    await use(client)

            asyncio.run(ask())
            server._socket.close()

        monkeypatch.setattr(LocalServer, "run", serve)
        code, stdout, err = lg(
            "review", source, "--guard", guard, "--out", out, "--port", 0, *words
        )
        return code, stdout, err

    run.out = out
    return run


async def nothing(client):
    """Ask nothing."""


async def label_all(client):
    """Label every prompt."""
    place = {"reviewer": "Ann"}
    answer = (await client.post("/review/next", json=place)).json()
    while answer["item"]:
        body = place | dict(key=answer["item"]["key"], label="harmless")
        answer = (await client.post("/review/label", json=body)).json()


def test_prompts_are_scored_and_labelled(review, files, guard):
    code, out, err = review(files["few"], label_all, "--reviewer", "Ann")
    assert code == 0
    assert out.startswith("http://127.0.0.1:")
    assert "Open this address" in err
    labels = [json.loads(line) for line in review.out.read_text().splitlines()]
    assert [row["id"] for row in labels] == [f"kind-{n}" for n in range(500, 520)]
    scores = review.out.with_name("labels.jsonl.scores").read_text()
    assert scores.splitlines()[0] == LatentGuard.load(guard).digest
    assert len(scores.splitlines()) == 21
    assert "Tell me" not in scores


def test_scores_are_read_again(review, files, monkeypatch):
    review(files["few"], nothing)
    kept = review.out.with_name("labels.jsonl.scores")
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:11]) + '["torn')
    scored = []
    scan = LatentGuard.scan

    def watched(self, backend, prompts, **how):
        scored.append(len(prompts))
        return scan(self, backend, prompts, **how)

    monkeypatch.setattr(LatentGuard, "scan", watched)
    review(files["few"], label_all)
    assert 10 in scored
    assert len(kept.read_text().splitlines()) == 21
    assert len(review.out.read_text().splitlines()) == 20


def test_tokens_speak(review, files):
    async def look(client):
        item = (await client.post("/review/next", json={"reviewer": "Ann"})).json()["item"]
        answer = await client.get(f"/review/tokens?key={item['key']}")
        assert "".join(text for text, _ in answer.json()["tokens"]) == item["text"]

    assert review(files["few"], look)[0] == 0


class TestAuditLog:
    def test_one_with_texts_is_reviewed(self, review, tmp_path):
        lines = [AUDIT | dict(prompt=f"{n}", text=f"Tell me thing {n % 3}") for n in range(9)]
        review(written(tmp_path / "audit.jsonl", lines), label_all)
        texts = [json.loads(line)["text"] for line in review.out.read_text().splitlines()]
        assert texts == ["Tell me thing 0", "Tell me thing 1", "Tell me thing 2"]

    def test_one_without_texts_is_refused_with_what_to_do(self, fails, guard, tmp_path):
        log = written(tmp_path / "audit.jsonl", [AUDIT | dict(prompt="a")])
        error = fails("review", log, "--guard", guard, "--out", tmp_path / "labels.jsonl")
        assert "holds no texts" in error
        assert "--audit-texts" in error


def test_a_prompt_file_is_no_label_file(fails, guard, files):
    before = files["few"].read_bytes()
    error = fails("review", files["few"], "--guard", guard, "--out", files["few"])
    assert "Name another file with --out" in error
    assert files["few"].read_bytes() == before


def test_the_source_is_read_before_anything_is_written(fails, guard, tmp_path):
    out = tmp_path / "labels.jsonl"
    assert "No such file" in fails("review", "nowhere.jsonl", "--guard", guard, "--out", out)
    assert not out.exists()


def test_labels_of_the_source_are_not_taken_over(review, tmp_path):
    source = written(tmp_path / "p.jsonl", rows(3, "sly", "harmful"))
    review(source, nothing)
    assert review.out.read_text() == ""
