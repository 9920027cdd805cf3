"""The dial: which settings the hours choose, and what a run with them is."""

import importlib
import itertools
import json
import lzma
import math
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import train
from parts import auto, data, dial, runtime
from parts.pretrained import checkpoints
from parts.tokenizer import get_tokenizer

import numpy as np
import pytest
import torch
from conftest import flags, losses, metrics, weights

STUDY = Path(__file__).parent.parent / "results" / "scaling"

# Tiny ones, so that a run takes a second.
SHAPES = ((1, 1, 16), (1, 2, 32), (2, 2, 64))
TIME_STEP = dial.time_step
MILLISECONDS = {16: 100, 32: 200, 64: 900}


@pytest.fixture
def hours(config, monkeypatch):
    """A config of 10 s, on a machine whose speed is known."""
    monkeypatch.setattr(dial, "SHAPES", SHAPES)
    monkeypatch.setattr(dial, "SEQUENCES", 2)
    monkeypatch.setattr(dial, "FEWEST_SEQUENCES", 2)
    monkeypatch.setattr(dial, "BLOCK_SIZE", 32)
    monkeypatch.setattr(dial, "STEPS_OF_LAW", 20)
    speed(monkeypatch, 1.0)
    chosen = {name: getattr(train.TrainConfig(), name) for name in dial.CHOSEN}
    return config(hours=10 / 3600, **chosen)


def speed(monkeypatch, factor: float) -> None:
    """Set the seconds of a step."""

    def time_step(config, model, machine):
        assert model.config.n_embd == config.n_embd
        return factor * MILLISECONDS[config.n_embd] / 1000

    monkeypatch.setattr(dial, "time_step", time_step)


def options(config) -> list[dial.Option]:
    """All that the dial would consider."""
    tokenizer = data.tokenizer_of_shards(config.data_dir)
    text = dial.study_text(config.data_dir, tokenizer)

    def build(config):
        return train.GPT(train.model_config(config, tokenizer.vocab_size))

    return list(dial.options(config, runtime.start("cpu"), text, build))


def typed_flags(config, typed: dict) -> list[str]:
    """The flags of a config, of those that the hours choose only these."""
    argv = []
    for flag in flags(config):
        name = flag.removeprefix("--").partition("=")[0]
        if name in typed or name not in dial.CHOSEN:
            argv.append(flag)
    return argv


def test_the_law_is_that_of_the_measurements():
    stored = json.loads((STUDY / "law.json").read_text())["dial"]
    for name, value in stored["law"].items():
        assert getattr(dial.LAW, name) == pytest.approx(value, rel=1e-3)
    rounded = {int(size): round(bits, 3) for size, bits in stored["xz_bits"].items()}
    assert dial.LAW_XZ_BITS == rounded
    assert dial.USEFUL_REPEATS == round(stored["useful_repeats"], 1)


def test_runs_of_as_many_steps_as_the_dial_asks_for_follow_the_law(monkeypatch):
    """Those of fewer that the law was not fitted to lie above it."""
    monkeypatch.syspath_prepend(str(STUDY))
    fit = importlib.import_module("fit")
    grid = importlib.import_module("grid")
    records = fit.read_records()
    fitted = fit.law_points(records)
    errors_of_enough = []
    errors_of_few = []
    for run in [*grid.grid_runs(), *grid.between_runs(), grid.last_run()]:
        if run.optimizer == "muon" and run.vocabulary == "books_4096" and run.name in records:
            point = fit.make_point(records[run.name])
            error = point.bits / dial.LAW.bits(point.parameters, point.n_bytes) - 1
            if run.steps >= dial.STEPS_OF_LAW:
                errors_of_enough.append(error)
            elif point not in fitted:
                errors_of_few.append(error)
    assert len(errors_of_enough) > 10 and max(map(abs, errors_of_enough)) < 0.02
    assert len(errors_of_few) > 3 and min(errors_of_few) > 0.025


def test_the_pieces_of_a_text_that_repeats_come_from_all_over_it(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    run = importlib.import_module("run")
    monkeypatch.setattr(run, "PIECE", 100)
    pieces = run.spread_pieces(torch.arange(10_000).numpy(), 450)
    assert len(pieces) == 451  # a last token to predict
    assert pieces[::100].tolist() == [0, 2_475, 4_950, 7_425, 9_900]
    assert pieces[100:200].tolist() == list(range(2_475, 2_575))


def test_the_dial_trains_as_the_measured_runs_did(config, monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    grid = importlib.import_module("grid")
    assert set(dial.SHAPES) <= set(grid.SIZES.values())
    monkeypatch.setattr(dial, "time_step", lambda *_: 1.0)
    chosen = {name: getattr(train.TrainConfig(), name) for name in dial.CHOSEN}
    monkeypatch.setattr(dial, "MOST_EPOCHS", 1000)
    for option in options(config(hours=1.0, **chosen)):
        run = grid.make_grid_run(option.config.n_embd, "muon", 1e14)
        measured = dict(argument.lstrip("-").split("=") for argument in run.arguments())
        for name in ("block_size", "batch_size", "total_batch_size", "optimizer", "min_lr"):
            assert str(getattr(option.config, name)) == measured[name]
        for name in ("learning_rate", "muon_learning_rate", "muon_momentum"):
            assert getattr(option.config, name) == float(measured[name])
        assert option.config.beta2 == float(measured["beta2"])
        vocab_size = grid.VOCABULARIES[run.vocabulary]
        model = train.GPT(train.model_config(option.config, vocab_size), initialise=False)
        outside = (vocab_size + 2) * run.size.n_embd  # embeddings and the last LayerNorm, as fit.py
        assert dial.law_size(option.config, model) == run.size.block_parameters + outside


def test_text_that_repeats_is_worth_less_and_at_last_nothing():
    text = dial.Text(train_tokens=1000, bytes_per_token=1.0, hardness=1.0)
    assert text.useful(700) == 700 and text.useful(1000) == 1000
    assert 1000 < text.useful(2000) < 2000
    R = dial.USEFUL_REPEATS
    assert text.useful(10**9) == pytest.approx(1000 * (1 + R))
    # Of many repetitions, each a small part: the sum of what is left of each.
    slope = (text.useful(3001) - text.useful(3000)) / 1
    assert slope == pytest.approx(math.exp(-2 / R), rel=1e-3)


def test_what_the_dial_knows_of_a_text(shards, monkeypatch):
    monkeypatch.setattr(dial, "SAMPLED_SHARE", 1)
    tokenizer = data.tokenizer_of_shards(shards)
    text = dial.study_text(str(shards), tokenizer)
    meta = json.loads((shards / "meta.json").read_text())
    assert text.train_tokens == meta["tokens"]["train"]
    assert text.bytes_per_token == pytest.approx(1.0, abs=0.01)  # but for the ends of documents
    content = b""
    for shard in data.open_shards(shards, "train"):
        n = (len(shard.tokens) - 1) // dial.BLOCK_SIZE * dial.BLOCK_SIZE
        content += tokenizer.decode(shard.tokens[1 : n + 1].tolist()).encode()
    bits = 8 * len(lzma.compress(content)) / len(content)
    assert text.hardness == bits / dial.law_xz_bits(len(content))


def test_a_compressor_sees_pieces_from_all_over_a_long_text(shards, monkeypatch):
    """Pieces of a window, so that it sees no more of a document at once than a model does."""
    monkeypatch.setattr(dial, "size_of_sample", lambda text_bytes: 4.1 * dial.BLOCK_SIZE)
    tokenizer = data.tokenizer_of_shards(shards)
    pieces = []
    for shard in data.open_shards(shards, "train"):
        for first in range(1, len(shard.tokens) - dial.BLOCK_SIZE + 1, dial.BLOCK_SIZE):
            ids = shard.tokens[first : first + dial.BLOCK_SIZE].tolist()
            pieces.append(tokenizer.decode_bytes(ids))
    last = len(pieces) - 1
    sample = b"".join(pieces[number] for number in (0, last // 3, 2 * last // 3, last))
    expected = dial.xz_bits(sample) / dial.law_xz_bits(len(sample))
    assert dial.study_text(str(shards), tokenizer).hardness == expected


def test_of_a_short_text_a_compressor_sees_a_sixteenth():
    """Windows next to each other repeat more than those of the law's text, which are far apart."""
    assert dial.size_of_sample(1e9) == 1_000_000
    assert dial.size_of_sample(1.6e6) == 100_000
    assert dial.size_of_sample(50_000) == 10_000  # the law's shortest piece


def test_a_part_of_a_text_is_as_hard_as_the_whole(tmp_path, monkeypatch):
    """Documents that repeat themselves: side by side they would look easier."""
    # Random characters do not get easier where there are more of them, as the law's text does.
    monkeypatch.setattr(dial, "law_xz_bits", lambda n_bytes: 1.0)
    generator = np.random.default_rng(6)
    documents = []
    for _ in range(4000):
        line = generator.integers(32, 127, 500)
        documents.append(np.concatenate([[256], np.tile(line, 4)]))
    hardness = []
    for n_documents in (4000, 50):
        folder = tmp_path / str(n_documents)
        folder.mkdir()
        tokens = np.concatenate(documents[:n_documents]).astype(np.uint16)
        data.write_shard(folder / "text_train_000001.bin", tokens)
        hardness.append(dial.study_text(str(folder), get_tokenizer("bytes")).hardness)
    assert hardness[1] == pytest.approx(hardness[0], rel=0.05)


def test_short_text_is_compared_with_as_short_a_piece_of_the_books():
    table = dial.LAW_XZ_BITS
    assert dial.law_xz_bits(30_000) == table[30_000]
    between = dial.law_xz_bits(round(math.sqrt(30_000 * 100_000)))
    assert between == pytest.approx((table[30_000] + table[100_000]) / 2, rel=1e-4)
    assert dial.law_xz_bits(10**9) == table[1_000_000]


def test_a_larger_model_has_as_many_steps_as_the_laws_runs(hours, monkeypatch):
    """Unless it is the text that ends, which ends for all sizes."""
    monkeypatch.setattr(dial, "STEPS_OF_LAW", 43)
    assert [option.config.max_steps for option in options(hours)] == [85]
    monkeypatch.setattr(dial, "most_steps", lambda config, text: 35)
    assert [option.config.max_steps for option in options(hours)] == [35, 35]


def test_fewer_steps_than_the_laws_runs_had_are_said(hours, monkeypatch, capsys):
    monkeypatch.setattr(dial, "STEPS_OF_LAW", 86)
    train.settings_by_hours(hours, runtime.start("cpu"), print)
    assert "hours: 85 steps are few, and the law is of 86 and more" in capsys.readouterr().out
    monkeypatch.setattr(dial, "STEPS_OF_LAW", 85)
    train.settings_by_hours(hours, runtime.start("cpu"), print)
    assert "are few" not in capsys.readouterr().out


def test_a_short_text_gets_no_model_that_is_much_larger_than_itself(hours, monkeypatch):
    speed(monkeypatch, 0.001)
    monkeypatch.setattr(dial, "most_steps", lambda config, text: 35)
    considered = options(hours)
    assert [option.config.n_embd for option in considered] == [16, 32, 64]
    train_tokens = json.loads((Path(hours.data_dir) / "meta.json").read_text())["tokens"]["train"]
    monkeypatch.setattr(dial, "MOST_PARAMETERS_PER_TOKEN", considered[1].parameters / train_tokens)
    assert [option.config.n_embd for option in options(hours)] == [16, 32]


def test_the_lowest_expected_loss_wins(hours, capsys):
    considered = options(hours)
    # Nine steps of the third are too few.
    assert [option.config.max_steps for option in considered] == [85, 42]
    best = min(considered, key=lambda option: option.bits)
    text = dial.study_text(hours.data_dir, data.tokenizer_of_shards(hours.data_dir))
    for option in considered:
        tokens = 64 * option.config.max_steps
        size = option.parameters - dial.BLOCK_SIZE * option.config.n_embd
        assert option.bits == dial.expected_bits(size, tokens, text)
    chosen = train.settings_by_hours(hours, runtime.start("cpu"), print)
    assert chosen == best.config
    assert f"{best.bits:.3f} bits a byte expected" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bits, chosen",
    [((1.02, 1.009, 1.0, 1.1), 1), ((1.02, 1.011, 1.0), 2), ((1.02, 1.011, 1.0, 1.1), 2)],
)
def test_of_sizes_that_are_as_good_the_smallest_wins(hours, monkeypatch, bits, chosen):
    [option, *_] = options(hours)
    sizes = []
    for number, expected in enumerate(bits):
        config = replace(option.config, seed=number)
        sizes.append(option._replace(bits=expected, config=config))
    monkeypatch.setattr(dial, "options", lambda *_: iter(sizes))
    assert train.settings_by_hours(hours, runtime.start("cpu"), print).seed == chosen


def test_more_time_than_the_law_has_sizes_for_is_said(hours, monkeypatch, capsys):
    speed(monkeypatch, 0.001)
    monkeypatch.setattr(dial, "MOST_EPOCHS", 10**6)
    chosen = train.settings_by_hours(hours, runtime.start("cpu"), print)
    assert chosen.n_embd == SHAPES[-1][2]
    assert "hours: the law is used for no larger size than width 64" in capsys.readouterr().out


def test_a_short_text_is_read_four_times_and_no_more(hours, monkeypatch, capsys):
    monkeypatch.setattr(dial, "STEPS_OF_LAW", 10_000)
    chosen = train.settings_by_hours(replace(hours, hours=100.0), runtime.start("cpu"), print)
    train_tokens = json.loads((Path(hours.data_dir) / "meta.json").read_text())["tokens"]["train"]
    read = chosen.max_steps * chosen.total_batch_size
    assert 4 * train_tokens - chosen.total_batch_size < read <= 4 * train_tokens
    printed = capsys.readouterr().out
    assert "it has read the text 4 times" in printed
    assert f"{chosen.max_steps:,} steps are few" in printed
    assert "no larger size" not in printed  # and a larger one would learn no more


def test_a_run_by_the_hours_is_the_run_of_the_settings_that_it_prints(hours, capsys):
    hours = replace(hours, seed=7, dropout=0.1)
    by_hours = losses(hours)
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("hours: the same by hand")]
    argv = shlex.split(line.split(": ")[2])
    assert argv[:2] == ["python", "train.py"]
    by_hand = train.configurator.configure(train.TrainConfig, argv[2:])
    assert by_hand.out_dir == f"{hours.out_dir}_by_hand"
    assert losses(by_hand) == by_hours

    run = metrics(hours.out_dir, "run")[0]
    assert run["expected_bpb"] in printed.splitlines()[-1]
    report = replace(hours, report=True)
    train.train(report)
    assert run["expected_bpb"] in (Path(hours.out_dir) / "report.md").read_text()


def test_a_resumed_run_keeps_its_settings_on_a_faster_machine(hours, tmp_path, monkeypatch):
    train.train(hours)
    whole = weights(hours.out_dir)
    again = replace(hours, out_dir=str(tmp_path / "again"))
    clip, calls = train.clip_gradients, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == 20:
            signal.raise_signal(signal.SIGTERM)
        return clip(*arguments)

    monkeypatch.setattr(train, "clip_gradients", interrupted)
    assert train.train(again)["stopped"]
    speed(monkeypatch, 0.1)
    train.train(again)
    assert metrics(again.out_dir)[-1]["step"] == metrics(hours.out_dir)[-1]["step"]
    for name, tensor in weights(again.out_dir).items():
        assert torch.equal(tensor, whole[name])


def test_which_checkpoint_gives_the_settings(hours, tmp_path, monkeypatch):
    train.train(hours)
    [*_, newest] = checkpoints(hours.out_dir)
    machine = runtime.start("cpu")
    steps = json.loads((newest / "settings.json").read_text())["settings"]["max_steps"]
    speed(monkeypatch, 1.5)
    elsewhere = replace(hours, out_dir=str(tmp_path / "elsewhere"), resume=str(newest))
    assert train.settings_by_hours(elsewhere, machine, print).max_steps == steps
    assert train.settings_by_hours(hours, machine, print).max_steps == steps
    longer = replace(hours, max_steps=7 * steps)  # as the finished run advises
    assert train.settings_by_hours(longer, machine, print).max_steps == 7 * steps
    anew = replace(hours, resume="never")
    assert train.settings_by_hours(anew, machine, print).max_steps != steps


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_shards_without_any_text(tmp_path, name):
    tokenizer = get_tokenizer(name)
    tokens = np.full(10_000, tokenizer.end_of_text, np.uint16)
    data.write_shard(tmp_path / "text_train_000001.bin", tokens)
    with pytest.raises(ValueError, match="its tokens are only ends of documents"):
        dial.study_text(str(tmp_path), tokenizer)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_embd=96), "hours chooses n_embd: leave them out, or hours, and set all by hand"),
        (dict(hours=1e-6), "is too short for 30 steps of the smallest model; set more"),
        (dict(optimizer="adamw"), "hours chooses optimizer: leave them out"),  # the default
        (dict(hours=-1.0), "hours is -1.0: it must be at least 0"),
        (dict(init_from="gpt2"), "hours is for a model from scratch; init_from has a size already"),
    ],
)
def test_hours_that_cannot_be(hours, capsys, changes, message):
    with pytest.raises(SystemExit) as end:
        train.main(typed_flags(replace(hours, **changes), changes))
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_short_for_the_dial(hours, monkeypatch):
    monkeypatch.setattr(dial, "FEWEST_STEPS", 10**6)
    with pytest.raises(ValueError, match=r"training tokens are too few .* 16,000,000 tokens at"):
        dial.study_text(hours.data_dir, data.tokenizer_of_shards(hours.data_dir))


@pytest.mark.parametrize("tokens, sequences", [(2_000, 4), (130_000, 8), (300_000, 16)])
def test_a_short_text_is_read_in_smaller_steps(tokens, sequences):
    text = dial.Text(train_tokens=tokens, bytes_per_token=1.0, hardness=1.0)
    assert dial.sequences_per_step(text) == sequences


def test_short_runs_are_evaluated_twice():
    """Five times 131,072 tokens would take as long as a hundred steps."""
    assert dial.settings_of_length(250, 4096)["eval_every"] == 250
    assert dial.settings_of_length(1001, 4096)["eval_every"] == 251  # four times, not five
    assert dial.settings_of_length(1000, 4096)["eval_every"] == 250
    # Two evaluations of a short run cost a seventh of its training at most.
    assert dial.settings_of_length(36, 4096)["eval_tokens"] == 36 * 4096 // 5
    assert dial.settings_of_length(1000, 4096)["eval_tokens"] == 131_072
    assert dial.settings_of_length(10_000, 4096)["eval_tokens"] == 10_000 * 4096 // 40


def test_hours_are_for_one_process(hours):
    two = replace(runtime.start("cpu"), world_size=2)
    with pytest.raises(ValueError, match="hours is for one process"):
        train.settings_by_hours(hours, two, print)


def test_a_step_is_timed_and_changes_nothing(hours, monkeypatch):
    monkeypatch.undo()  # dial's own time_step
    ticks = itertools.count()
    monkeypatch.setattr(dial.time, "perf_counter", lambda: 0.25 * next(ticks))
    model_settings = dict(n_layer=1, n_head=2, n_embd=32, block_size=256)
    config = replace(hours, **model_settings, batch_size=2, total_batch_size=512, optimizer="muon")
    torch.manual_seed(0)
    model = train.GPT(train.model_config(config, 257))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert dial.time_step(config, model, runtime.start("cpu")) == 0.25
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_each_size_is_timed_with_all_threads(hours, monkeypatch):
    """The race of a small model may take one thread, which a larger one shall not inherit."""
    monkeypatch.setattr(dial, "time_updates", lambda *_: float(torch.get_num_threads()))
    lengths = []

    def choose_arithmetic(config, *_):
        lengths.append(config.max_steps)
        return auto.Arithmetic("fp32", True, threads=1, compile=False), ""

    monkeypatch.setattr(auto, "choose_arithmetic", choose_arithmetic)
    monkeypatch.setattr(auto, "expected_seconds", lambda flops, machine: 0.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    model = train.GPT(train.model_config(replace(hours, n_layer=1, n_head=2, n_embd=32), 257))
    try:
        seconds = TIME_STEP(hours, model, runtime.start("cpu"))
        assert (seconds, torch.get_num_threads()) == (1.0, 2)
        assert lengths == [20]  # steps of half a second in ten seconds, which decide the precision
    finally:
        torch.set_num_threads(threads)
