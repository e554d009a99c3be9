"""Worker side of the model benchmark: one model in one form, eager or compiled, in training or in inference."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from model_forms import FORMS, Inputs, Nested
from model_text import Model, TextBatch
from torch import nn
from torch.nn.functional import cross_entropy
from transformer import Transformer

import jagtile
from jagtile.generator.oracle import torch_dtype
from jagtile.generator.spec import DType
from jagtile.generator.worker import Note
from jagtile.runtime.routes import BACKWARD_ROUTES, ROUTES
from jagtile.runtime.trainable import why_no_backward

Array = npt.NDArray[np.float32]
Result = TypeVar("Result")

_COMPARED_ROWS = 512  # of the features
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


Mode = Literal["eager", "compiled"]
Task = Literal["training", "inference"]
MODES: tuple[Mode, ...] = ("eager", "compiled")
TASKS: tuple[Task, ...] = ("training", "inference")


class Way(NamedTuple):
    """How a model is run."""

    form: str
    mode: Mode
    task: Task

    @property
    def compiled(self) -> bool:
        return self.mode == "compiled"


@dataclass(frozen=True)
class Refused:
    """What does not run, and why."""

    state: Literal["refused", "failed"]
    reason: str


@dataclass(frozen=True)
class Evidence:
    """What was computed on the first batch, and what it takes.

    In inference ``found`` is some packed features (1, rows, width), in training the gradients of the first block's
    weights of query, key and value (3, width, width). ``peak_bytes`` are those above what was held before the model was
    made; None where the system does not tell. ``compile_s`` are the seconds that torch.compile took by now, None in
    eager mode.
    """

    found: Array
    peak_bytes: int | None
    compile_s: float | None
    note: str  # what is to be known of how it ran


class Batch:
    """A batch on the device, in a form."""

    def __init__(self, form: str, text: TextBatch, device: torch.device) -> None:
        self.inputs: Inputs = FORMS[form].inputs([torch.from_numpy(tokens) for tokens in text.sequences], device)
        self.rows = torch.from_numpy(text.rows).to(device)
        self.targets = torch.from_numpy(text.targets).to(device)


@dataclass(frozen=True)
class _Running:
    """A task under way: ``step`` runs it on a batch, ``look`` gives what is to be compared and changes no weight."""

    step: Callable[[Batch], object]
    look: Callable[[Batch], torch.Tensor]


class Runner:
    """The worker's object. What a call raises is its result.

    ``scratch``: a folder for what torch.compile makes.
    """

    def __init__(
        self, way: Way, model: Model, texts: Sequence[TextBatch], dtype: DType, device: str, scratch: str
    ) -> None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch  # of its own: a worker that is killed leaves half-written files
        # Others compile at the same time.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // 8)))
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device.index or 0)
        self._way, self._form = way, FORMS[way.form]
        self._model, self._texts, self._dtype = model, texts, torch_dtype(dtype)
        self._batches: list[Batch] = []
        if self._form.jagtile:
            jagtile.enable()
        if isinstance(self._form, Nested):
            torch.backends.cuda.enable_cudnn_sdp(False)  # on nested tensors it has ended in an illegal memory access

    def start(self, note: Note) -> Refused | None:
        """Make the model and run parts of batches, which builds and compiles what is needed."""
        note("start")

        def start() -> None:
            if self._form.jagtile:
                self._warm_up()
            self._held_before = held_bytes(self.device)
            self._running = (self._inference if self._way.task == "inference" else self._training)()
            for text, sequences in ((self._texts[0], 2), (self._texts[-1], 3)):
                self._running.look(Batch(self._form.name, text.first(sequences), self.device))

        return self._attempt(start)

    def check(self, note: Note) -> Evidence | Refused:
        """Run all batches once."""
        note("check")

        def check() -> Evidence:
            self._batches = [Batch(self._form.name, text, self.device) for text in self._texts]
            found = self._running.look(self._batches[0]).float().cpu().numpy()
            forget_peak(self.device)
            for batch in self._batches:
                self._running.step(batch)
            peak, before = peak_bytes(self.device), self._held_before
            taken = None if peak is None or before is None else peak - before
            return Evidence(found, taken, self._compile_seconds(), self._note())

        return self._attempt(check)

    def turn(self, note: Note) -> float | Refused:
        """Seconds for all batches, after a pass that is not timed."""
        note("time")

        def turn() -> float:
            seconds = 0.0
            for _ in range(2):
                begin = time.perf_counter()
                for batch in self._batches:
                    self._running.step(batch)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds = time.perf_counter() - begin
            return seconds

        return self._attempt(turn)

    def _attempt(self, function: Callable[[], Result]) -> Result | Refused:
        try:
            return function()
        except jagtile.UnsupportedError as error:
            return Refused("refused", str(error))
        except Exception as error:
            return Refused("failed", f"{type(error).__name__}: {error}")
        finally:
            if self.device.type == "cuda":
                with suppress(RuntimeError):  # of a context that is ruined
                    torch.cuda.empty_cache()  # others run on this GPU too

    def _warm_up(self) -> None:
        kind = {"is_causal": self._model.is_causal, "device": self.device}
        with suppress(jagtile.UnsupportedError):  # for want of a kernel: what then happens is to be seen
            jagtile.warmup(self._model.head_dim, self._dtype, training=self._way.task == "training", **kind)

    def _modules(self) -> tuple[Transformer, nn.Module]:
        """The body and the head, with the same weights in every worker."""
        torch.manual_seed(0)
        model = self._model
        body = Transformer(model.vocabulary, model.max_length, model.layers, model.heads, model.head_dim)
        head = nn.Linear(model.heads * model.head_dim, model.vocabulary, bias=False)
        return body.to(self.device), head.to(self.device)

    def _inference(self) -> _Running:
        """Features of every token, with weights of the dtype."""
        body = self._modules()[0].to(self._dtype).eval()
        features = self._perhaps_compiled(lambda inputs: self._form.features(body, inputs, self._model.is_causal))

        @torch.no_grad()
        def step(batch: Batch) -> torch.Tensor:
            return features(batch.inputs)

        def look(batch: Batch) -> torch.Tensor:
            found = step(batch)
            return found[None, :: max(1, len(found) // _COMPARED_ROWS)]

        return _Running(step, look)

    def _training(self) -> _Running:
        """A step of AdamW on float32 weights; 16 bits by autocast."""
        body, head = self._modules()
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], 1e-4, fused=True)
        autocast = torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)

        def predict(inputs: Inputs, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            features = self._form.features(body, inputs, self._model.is_causal)
            return cross_entropy(head(features[rows]).float(), targets)

        loss_of = self._perhaps_compiled(predict)

        def differentiate(batch: Batch) -> None:
            with autocast:
                loss = loss_of(batch.inputs, batch.rows, batch.targets)
            loss.backward()

        def step(batch: Batch) -> None:
            differentiate(batch)
            optimizer.step()
            optimizer.zero_grad()

        def look(batch: Batch) -> torch.Tensor:
            differentiate(batch)
            first = body.blocks[0]
            found = torch.stack([layer.weight.grad for layer in (first.query, first.key, first.value)])
            optimizer.zero_grad()
            return found

        return _Running(step, look)

    def _perhaps_compiled(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if not self._way.compiled:
            return function
        from torch._functorch import config

        config.enable_autograd_cache = False  # it can't store nested tensors, and says so at length
        return torch.compile(function, dynamic=True)

    def _compile_seconds(self) -> float | None:
        return torch._dynamo.utils.calculate_time_spent()["total_wall_time"] if self._way.compiled else None

    def _note(self) -> str:
        said = []
        if self._form.jagtile and self._way.task == "training" and not BACKWARD_ROUTES:
            size = self._model.head_dim
            why = why_no_backward(self._dtype, size, size, self.device)
            said.append(f"torch's own attention: {why or 'jagtile was not asked'}")
        if self._form.jagtile and self._way.task == "inference" and not ROUTES:
            said.append("no kernel of jagtile's")
        if breaks := sum(torch._dynamo.utils.counters["graph_break"].values()) if self._way.compiled else 0:
            said.append(f"{breaks} graph breaks")
        return "; ".join(said)


def held_bytes(device: torch.device) -> int | None:
    """Allocated now: on a GPU by torch, else resident memory of the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int | None:
    """The most since ``forget_peak``."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            _CLEAR_REFS.write_text("5")  # Linux: the peak is what is resident now


def _status_bytes(field: str) -> int | None:
    """A field of Linux's description of this process; None elsewhere."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
