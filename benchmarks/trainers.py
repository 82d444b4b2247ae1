"""Which heads of the installed transformers does its Trainer train with a gradient that is not the whole batch's?

    python benchmarks/trainers.py [--json FILE] [--kinds KIND ...] [--heads PART ...] [--exact] [--time]

The census. Every class that transformers' own tables list for a kind of head is made small from its configuration and
trained for one update by the stock Trainer, 2 x 4 rows, all of one length and every label counting: nothing is ragged,
so all that can go wrong is how often a loss is divided. The gradient's size is compared with the one of
``model(**batch).loss`` on all 8 rows. A head is

    right               within 1% of it
    4 times             as many times too large as there are micro-batches
    off                 anything else; the ratio is on file
    not run             cannot be made small from its configuration alone, or needs other inputs; the reason is on file

With --exact `ExactTrainer` is run beside it, and its distance from the whole batch's gradient printed. With --time no
census is taken, but the time of a micro-batch in the exact Trainer is compared with the stock one's, on a tiny model
and on GPT-2's shape.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _common import write_results
from _timing import compare
from torch import Tensor, nn

PER_DEVICE, STEPS, POSITIONS, WORDS = 2, 4, 9, 64
MOST_PARAMETERS, SECONDS = 3_000_000, 30
KINDS = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "sequence to sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "ffn_hidden_size"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


class TooSlowError(Exception):
    """A head that takes more than half a minute of the processor."""


def small(name: str, kind: str) -> nn.Module:
    """A model of the class, from its configuration with small sizes and without dropout.

    Raises:
        ValueError: it does not get small.
    """
    import transformers

    cls: Any = getattr(transformers, name)
    config = cls.config_class()
    sizes = {key: value for key, value in SMALL.items() if hasattr(config, key)}
    sizes |= {key: 0.0 for key, value in config.to_dict().items() if "drop" in key and isinstance(value, float)}
    if kind.endswith("classification"):
        sizes["num_labels"] = 3
    config = cls.config_class(**sizes)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cls(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters / 1e6:.0f} million parameters with everything small that has a known name")
    torch.manual_seed(0)
    model = cls(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # some classes have one that no option names
            module.p = 0.0
        for name in ("router_jitter_noise", "input_jitter_noise"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


def rows_for(kind: str, number: int = PER_DEVICE * STEPS, positions: int = POSITIONS) -> list[dict[str, Tensor]]:
    """Rows of one length, with a label for every word or one for the row."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Tensor]] = []
    for _ in range(number):
        words = torch.randint(4, WORDS, (positions,), generator=generator)
        labels = {"sequence classification": words[0] % 3, "token classification": words % 3}.get(kind, words)
        rows.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": labels})
    return rows


def trainer_of(cls: Any, model: nn.Module, rows: Any, folder: str, *, callbacks: Any = (), **options: Any) -> Any:
    """A Trainer that logs and saves nothing."""
    from transformers import PrinterCallback, TrainingArguments

    arguments: dict[str, Any] = {
        "per_device_train_batch_size": PER_DEVICE, "gradient_accumulation_steps": STEPS, "num_train_epochs": 1,
        "learning_rate": 0.0, "max_grad_norm": 0.0, "optim": "sgd", "save_strategy": "no", "logging_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    made = cls(
        model=model, args=TrainingArguments(folder, **{**arguments, **options}), train_dataset=rows,
        callbacks=list(callbacks),
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made


def gradient(cls: Any, model: nn.Module, rows: list[dict[str, Tensor]], folder: str) -> Tensor:
    """What the optimizer is about to see, in a row."""
    from transformers import TrainerCallback

    class Sees(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.seen = flat(model)

    sees = Sees()
    trainer_of(cls, copy.deepcopy(model), rows, folder, callbacks=[sees]).train()
    return sees.seen


def flat(model: nn.Module) -> Tensor:
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad)
    return torch.cat([one.detach().double().flatten() for one in gradients])


def one_head(name: str, kind: str, folder: str, *, with_exact: bool) -> dict[str, Any]:
    """How many times too large the stock gradient is, and how far each is from the whole batch's."""
    from transformers import Trainer

    model, rows = small(name, kind).train(), rows_for(kind)
    whole = copy.deepcopy(model)
    whole(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss.backward()
    right = flat(whole)
    if not right.norm() or not right.isfinite().all():
        raise ValueError("its gradient is zero or not finite")
    stock = gradient(Trainer, model, rows, folder)
    ratio = float(stock.norm() / right.norm())
    verdict = "right" if abs(ratio - 1) < 0.01 else f"{STEPS} times" if abs(ratio / STEPS - 1) < 0.01 else "off"
    found: dict[str, Any] = {"verdict": verdict, "ratio": ratio, "error": float((stock - right).norm() / right.norm())}
    if with_exact:
        from gradaccum.integrations.transformers import ExactTrainer

        found["exact"] = float((gradient(ExactTrainer, model, rows, folder) - right).norm() / right.norm())
    return found


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Context manager without output, without warnings, and for some seconds of processor time at most."""

    def stop(*_: Any) -> None:
        raise TooSlowError(f"takes more than {SECONDS} s of the processor")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        unseen = io.StringIO()
        with contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def census(kinds: list[str], parts: list[str], *, with_exact: bool) -> dict[str, Any]:
    """Every head of these kinds."""
    import transformers
    from transformers.models.auto import modeling_auto

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {}
    for kind in kinds:
        tables = getattr(modeling_auto, KINDS[kind]).values()
        names = {name for entry in tables for name in (entry if isinstance(entry, tuple) else (entry,))}
        found[kind] = {}
        for name in sorted(names):
            if parts and not any(part in name for part in parts):
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    with quietly():
                        found[kind][name] = one_head(name, kind, folder, with_exact=with_exact)
                except Exception as error:  # noqa: BLE001  # whatever a model does not like about its inputs
                    reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                    found[kind][name] = {"verdict": "not run", "reason": reason}
            one = found[kind][name]
            shown = f"{one['ratio']:8.4f}" if "ratio" in one else one["reason"][:60]
            exact = f"   exact {one['exact']:.1e}" if "exact" in one else ""
            print(f"{kind:24} {name:48} {one['verdict']:8} {shown}{exact}", flush=True)
    return found


def summary(found: dict[str, Any]) -> None:
    verdicts = ("right", f"{STEPS} times", "off", "not run")
    print(f"\n{'':26}" + "".join(f"{verdict:>10}" for verdict in verdicts))
    for kind, heads in found.items():
        counts = Counter(one["verdict"] for one in heads.values())
        print(f"{kind:26}" + "".join(f"{counts[verdict]:10}" for verdict in verdicts))


# ---------------------------------------------------------------------------------------------------------------- time
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": WORDS, "n_positions": 64},
    "GPT-2": {"vocab_size": 50257, "n_positions": 1024},
}


def times(shape: str, rounds: int, windows: int) -> dict[str, Any]:
    """Seconds of a micro-batch in both trainers, by whole trainings less their construction."""
    import transformers

    from gradaccum.integrations.transformers import ExactTrainer

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SHAPES[shape], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(config)
    positions = POSITIONS if shape == "tiny" else 64
    rows = rows_for("causal LM", windows * PER_DEVICE * STEPS, positions)

    def clocked(cls: Any, **options: Any) -> Any:
        folder = tempfile.mkdtemp()
        trainer = trainer_of(lambda **given: cls(**given, **options), model, rows, folder)

        def run() -> tuple[float, float]:
            clock, processor = time.perf_counter(), time.process_time()
            with quietly():
                trainer.train()
            return time.perf_counter() - clock, time.process_time() - processor

        return run

    runs = {"stock": clocked(transformers.Trainer), "exact": clocked(ExactTrainer)}
    found = compare(runs, rounds)
    micro_batches = windows * STEPS
    for name, one in found.items():
        milliseconds = 1000 * one.seconds / micro_batches
        print(
            f"{shape:6} {name:6} {milliseconds:8.2f} ms a micro-batch   {one.ratio:.2f} of the stock Trainer's, "
            f"{one.processor_ratio:.2f} in processor time",
            flush=True,
        )
    return {name: asdict(one) for name, one in found.items()}


def main() -> None:
    global SECONDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results are written")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--heads", nargs="+", default=[], metavar="PART", help="only classes with this in their names")
    parser.add_argument("--exact", action="store_true", help="the exact Trainer beside the stock one")
    parser.add_argument("--time", action="store_true", help="time instead of the census")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="of the timing")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.time:
        SECONDS = 600
        windows = {"tiny": 25, "GPT-2": 1}
        found = {shape: times(shape, arguments.rounds, windows[shape]) for shape in arguments.shapes}
        results: dict[str, Any] = {"times": found}
    else:
        results = {"heads": census(arguments.kinds, arguments.heads, with_exact=arguments.exact)}
        summary(results["heads"])
    if arguments.json:
        write_results(arguments.json, results)


if __name__ == "__main__":
    main()
