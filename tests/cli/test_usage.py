"""Help and usage: panels, one example a verb, old option names, exit code 2."""

import inspect
import re
import shlex

import pytest
import typer

from latentguard.cli import app

VERBS = {
    "demo": ("--out", "--guard", "--model"),
    "fit": ("--harmful", "--contrast", "--reading", "--dtype", "--quantize", "--device-map"),
    "calibrate": ("--harmless", "--max-fpr", "--balanced", "--cost-ratio", "--traffic"),
    "score": ("--out", "--text-column", "--engine", "--actors", "--block-rows"),
    "review": ("--out", "--guard", "--reviewer", "--adapt-out", "--port"),
    "benchmark": ("--data-dir", "--out", "--only", "--limit"),
    "evaluate": ("--json", "--segment-column", "--text-column"),
    "audit": ("--label", "--text-column"),
    "show": (),
    "guards": ("--model", "--local"),
    "pull": ("--out", "--revision", "--overwrite"),
    "drift": ("--json", "--text-column"),
    "stress": ("--only", "--budget"),
    "serve": ("--host", "--port", "--upstream"),
    "sign": ("--key",),
    "parity": ("--backends",),
    "study": ("--only", "--budget", "--data-dir", "--device-map"),
    "compare": ("--out",),
    "label": ("--out", "--model"),
    "pack add": ("--name", "--examples"),
    "pack list": (),
    "pack remove": ("--harmless",),
    "data list": ("--data-dir",),
    "data fetch": ("--out", "--mirror", "--only"),
    "data import-released": ("--out",),
}


class TestUsage:
    @pytest.mark.parametrize(("verb", "options"), VERBS.items())
    def test_help(self, lg, verb, options):
        code, out, err = lg(*verb.split(), "--help")
        assert (code, err) == (0, "")
        assert f"latentguard {verb}" in out
        assert all(option in out for option in options)

    @pytest.mark.parametrize("verb", ["", *VERBS, "pack", "data"])
    def test_help_prints_every_word_of_the_help_texts(self, lg, monkeypatch, verb):
        """Square brackets too, which Rich takes for markup."""
        monkeypatch.setenv("COLUMNS", "2000")  # wide enough that no text is wrapped
        command = typer.main.get_command(app)
        for name in verb.split():
            command = command.commands[name]
        parts = [command, *command.params, *getattr(command, "commands", {}).values()]
        texts = [inspect.cleandoc(part.help or "").split("\n\n")[0] for part in parts]
        texts += [*inspect.cleandoc(command.help).split("\n\n"), command.epilog or ""]
        out = " ".join(lg(*verb.split(), "--help")[1].split())
        assert [text for text in texts if " ".join(text.split()) not in out] == []

    def test_help_of_all(self, lg):
        code, out, _ = lg("--help")
        assert code == 0
        assert all(verb.split()[0] in out for verb in VERBS)
        assert "latentguard demo" in out

    def test_help_groups_the_verbs_in_panels(self, lg):
        _, out, _ = lg("--help")
        panels = [line.split()[1] for line in out.splitlines() if line.startswith("╭─ ")]
        assert panels == ["Options", "Guard", "Serve", "Research"]

    @pytest.mark.parametrize("verb", VERBS)
    def test_the_example_of_a_verb_is_valid_usage(self, lg, verb):
        """Parsed as a shell would split it, without being run."""
        _, out, _ = lg(*verb.split(), "--help")
        (example,) = re.findall(r"Example: latentguard (.*)", out)
        words = shlex.split(example)
        assert words[: len(verb.split())] == verb.split()
        command = typer.main.get_command(app)
        for name in verb.split():
            command = command.commands[name] if hasattr(command, "commands") else command
        with typer.Context(typer.main.get_command(app)) as outer:
            command.make_context(verb, words[len(verb.split()) :], parent=outer)

    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("--readout", "--probe", ["fit", "--out", "g", "{}", "centroid"]),
            ("--slice-column", "--segment-column", ["calibrate", "none", "{}", "language"]),
            ("--slice-header", "--segment-header", ["serve", "none", "{}", "X-Client"]),
        ],
    )
    def test_an_old_option_name_works_and_is_not_shown(self, lg, old, new, words):
        said = [lg(*[word.format(name) for word in words], "--no-such") for name in (old, new)]
        assert all("No such option: --no-such" in err for _, _, err in said)
        assert old not in lg(words[0], "--help")[1]

    @pytest.mark.parametrize(
        "words",
        [
            ["no-such-verb"],
            ["fit"],
            ["fit", "--out", "g", "--no-such-option"],
            ["calibrate"],
            ["calibrate", "g", "--max-fpr", "low"],
            ["score", "g"],
            ["audit"],
            ["audit", "f.jsonl", "--label", "harmfull"],
            ["fit", "--out", "g", "--probe", "tree"],
        ],
        ids=" ".join,
    )
    def test_wrong_usage_is_2(self, lg, words):
        code, out, err = lg(*words)
        assert (code, out) == (2, "")
        assert "Usage: " in err
        assert "Traceback" not in err
