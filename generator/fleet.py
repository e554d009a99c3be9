"""A study that several tuners share, on one machine or on many: who measures what, and what came of it.

The storage is an Optuna storage; each trial of it is a claim on one key (a config, or a regime's finals). A claim holds
where no earlier one does: trials are numbered by the storage, so all tuners agree without a lock. A tuner shows that it
lives by counting; one whose count stands still for the grace period is gone, and what it had claimed is up for others.
Clocks are never compared, and whatever a tuner measured travels with its trial, so that every tuner has all records.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from jagtile.generator.tile import Knob
from jagtile.runtime.errors import TuningError
from jagtile.tuning_db.schema import TuningRecord

if TYPE_CHECKING:
    import optuna

log = logging.getLogger("jagtile")

GRACE_SECONDS = 60.0
STORAGES = "postgresql://USER@HOST/DATABASE, sqlite:///FILE or journal:///FILE"
_BEATS = 6  # a grace period
_MAX_LOSSES = 3  # tuners that vanished with a claim on the same key, before it is given up
_START_TRIES = 8  # to create the tables while others do so too


@dataclass(frozen=True)
class Point:
    """A config as Optuna sees it."""

    params: dict[str, Knob]
    domains: dict[str, tuple[Knob, ...]]


NO_POINT = Point({}, {})  # of a key that is no config


@dataclass(frozen=True)
class Entry:
    """What came of a key: its value (None: it failed) and the records behind it."""

    value: float | None
    records: tuple[TuningRecord, ...]


@dataclass(frozen=True)
class View:
    """A ledger as it is now."""

    results: dict[str, Entry]
    holders: dict[str, str]  # key -> token of the claim that holds, oldest first; finished ones too
    claimed: frozenset[str]  # keys that others are at work on


class Fleet:
    """One tuner's membership. A context manager: leaving it releases what is claimed and says so."""

    def __init__(self, url: str, name: str, grace: float = GRACE_SECONDS) -> None:
        """``name``: of what is tuned; tuners of the same name at the same storage work together.

        TuningError where the storage can't be used.
        """
        if grace < 1:
            raise ValueError(f"grace must be at least 1 s, got {grace}")
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.number = zlib.crc32(self.worker.encode())  # for what should differ between tuners
        self.poll = min(1.0, grace / 8)
        self._name, self._grace, self._shown = name, grace, _without_password(url)
        self._seen: dict[str, tuple[object, float]] = {}  # by worker: its count, and when it last changed
        self._ledgers: dict[str, Ledger] = {}
        self._stopped = threading.Event()
        with self.errors():
            self.storage = _open(url)
            self._roll = _study(self.storage, f"{name}/workers")
            self._beat(0)
        self._heart = threading.Thread(target=self._live, name="jagtile-fleet", daemon=True)
        self._heart.start()

    def ledger(self, name: str) -> Ledger:
        """The ledger of a name, the same one every time."""
        if name not in self._ledgers:
            with self.errors():
                self._ledgers[name] = Ledger(self, _study(self.storage, f"{self._name}/{name}"))
        return self._ledgers[name]

    def records(self) -> list[TuningRecord]:
        """Every record that the fleet has in the ledgers opened so far."""
        entries = [entry for ledger in self._ledgers.values() for entry in ledger.read().results.values()]
        return [record for entry in entries for record in entry.records]

    def gone(self) -> set[str]:
        """Tuners that left, or whose count stood still for the grace period while we looked."""
        now, gone = time.monotonic(), set()
        with self.errors():
            counts = self.storage.get_study_user_attrs(self._roll)
        for worker, count in counts.items():
            before = self._seen.get(worker)
            if before is None or before[0] != count:
                self._seen[worker] = (count, now)
            if count is None or now - self._seen[worker][1] > self._grace:
                gone.add(worker)
        return gone - {self.worker}

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what the storage raises into a TuningError that names it, without its password."""
        try:
            yield
        except (ImportError, OSError, ValueError, RuntimeError, LookupError) as error:
            raise TuningError(self._trouble(error)) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("optuna", "sqlalchemy", "psycopg", "sqlite3"):
                raise
            raise TuningError(self._trouble(error)) from error

    def _trouble(self, error: Exception) -> str:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = next(iter(str(root).strip().splitlines()), "") or type(root).__name__
        helps = "pip install 'jagtile[fleet]'" if isinstance(root, ImportError) else f"a storage is {STORAGES}"
        return f"the storage {self._shown} can't be used: {reason} ({helps}); what was measured is on record"

    def _live(self) -> None:
        beats = 0
        while not self._stopped.wait(self._grace / _BEATS):
            beats += 1
            try:
                with self.errors():
                    self._beat(beats)
            except TuningError as error:  # others may take us for gone; then they repeat what we do
                log.warning("fleet: %s", error)

    def _beat(self, count: int | None) -> None:
        self.storage.set_study_user_attr(self._roll, self.worker, count)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._heart.join(10)
        with contextlib.suppress(TuningError), self.errors():
            for ledger in self._ledgers.values():
                ledger.release()
            self._beat(None)
            self.storage.remove_session()


@dataclass
class Ledger:
    """Claims and results of one set of keys."""

    fleet: Fleet
    study: int
    _mine: dict[str, int] = field(default_factory=dict)  # our claims: trial ids by key

    def read(self) -> View:
        """What others claimed and found. The claims of tuners that are gone end here."""
        gone = self.fleet.gone()
        results: dict[str, Entry] = {}
        holders: dict[str, str] = {}
        claimed: set[str] = set()
        losses: Counter[str] = Counter()
        for trial in self._trials():
            key, worker = str(trial.user_attrs.get("key", "")), trial.user_attrs.get("worker")
            state = trial.state.name
            if state == "RUNNING" and worker in gone:
                log.info("fleet: %s left %s unfinished; it is up for others", worker, key)
                self._fail(self._id(trial), lost=True)
                losses[key] += 1
            elif state == "FAIL":
                losses[key] += "lost" in trial.user_attrs
            elif state in ("RUNNING", "COMPLETE", "PRUNED"):
                holders.setdefault(key, str(trial.user_attrs.get("claim")))
                if state == "RUNNING":
                    claimed |= {key} - self._mine.keys()
                elif key not in results:
                    results[key] = _entry(trial)
        for key, count in losses.items():
            if count >= _MAX_LOSSES and key not in holders:
                results[key] = Entry(None, ())
        return View(results, holders, frozenset(claimed - results.keys()))

    def claim(self, points: Mapping[str, Point], limit: int | None = None) -> set[str]:
        """Those of the keys that are ours now. ``limit``: of keys in all; what comes later is not had."""
        tokens: dict[str, str] = {}
        with self.fleet.errors():
            for key, point in points.items():
                tokens[key] = uuid.uuid4().hex
                self._mine[key] = self._create("RUNNING", key, point, claim=tokens[key])
        within = list(self.read().holders.items())[:limit]
        won = {key for key, token in within if tokens.get(key) == token}
        with self.fleet.errors():
            for key in points.keys() - won:
                self._fail(self._mine.pop(key))
        return won

    def holds(self, key: str) -> bool:
        """Whether we claimed the key and did not tell yet what came of it."""
        return key in self._mine

    def tell(self, key: str, value: float | None, records: Sequence[TuningRecord]) -> None:
        """What came of a key that we claimed."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial = self._mine.pop(key)
        with self.fleet.errors():
            try:
                self.fleet.storage.set_trial_user_attr(trial, "records", msgspec.to_builtins(records))
                state = TrialState.PRUNED if value is None else TrialState.COMPLETE
                self.fleet.storage.set_trial_state_values(trial, state, None if value is None else [value])
            except UpdateFinishedTrialError:
                log.warning("fleet: we were taken for gone; %s is measured by another tuner as well", key)

    def publish(self, key: str, point: Point, value: float | None, records: Sequence[TuningRecord]) -> None:
        """What is known of a key without a claim."""
        with self.fleet.errors():
            self._create("PRUNED" if value is None else "COMPLETE", key, point, value, records)

    def share(self, keys: Sequence[str]) -> Iterator[str]:
        """The keys that are ours to do, one at a time, until all have a result; waits while others are at it."""
        while True:
            view = self.read()
            missing = [key for key in keys if key not in view.results]
            if not missing:
                return
            free = [key for key in missing if key not in view.claimed]
            won = self.claim({free[0]: NO_POINT}) if free else set()
            if won:
                yield free[0]
            elif not free:
                time.sleep(self.fleet.poll)

    def release(self) -> None:
        """Give up our claims."""
        while self._mine:
            self._fail(self._mine.popitem()[1])

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        with self.fleet.errors():
            trials = self.fleet.storage.get_all_trials(self.study, deepcopy=False)
        return sorted(trials, key=lambda trial: trial.number)

    def _id(self, trial: optuna.trial.FrozenTrial) -> int:
        return self.fleet.storage.get_trial_id_from_study_id_trial_number(self.study, trial.number)

    def _fail(self, trial: int, *, lost: bool = False) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with self.fleet.errors(), contextlib.suppress(UpdateFinishedTrialError):  # another did so before us
            if lost:
                self.fleet.storage.set_trial_user_attr(trial, "lost", True)
            self.fleet.storage.set_trial_state_values(trial, TrialState.FAIL)

    def _create(
        self,
        state: str,
        key: str,
        point: Point,
        value: float | None = None,
        records: Sequence[TuningRecord] = (),
        claim: str = "",
    ) -> int:
        """A trial with all it has, in one transaction: others see it whole or not at all."""
        from optuna.distributions import CategoricalDistribution
        from optuna.trial import TrialState, create_trial

        attributes = {"key": key, "worker": self.fleet.worker, "claim": claim, "records": msgspec.to_builtins(records)}
        trial = create_trial(
            state=TrialState[state],
            value=value,
            params=point.params,
            distributions={name: CategoricalDistribution(domain) for name, domain in point.domains.items()},
            user_attrs=attributes,
        )
        return self.fleet.storage.create_new_trial(self.study, trial)


def _entry(trial: optuna.trial.FrozenTrial) -> Entry:
    records = msgspec.convert(trial.user_attrs.get("records", []), tuple[TuningRecord, ...])
    return Entry(trial.value if trial.state.name == "COMPLETE" else None, records)


def _open(url: str) -> optuna.storages.BaseStorage:
    """The storage of a URL."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    scheme, separator, rest = url.partition("://")
    if not separator or not rest:
        raise ValueError(f"{url!r} is no URL")
    if scheme == "journal":
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(rest.removeprefix("/")))  # as sqlite has it
    options: dict[str, object] = {"pool_pre_ping": True}  # a server may restart between two trials
    if scheme == "sqlite":
        options = {"connect_args": {"timeout": 60}}  # seconds that a writer waits for others
    elif scheme in ("postgres", "postgresql"):
        url = f"postgresql+psycopg://{rest}"  # SQLAlchemy would take psycopg2
    for attempt in range(_START_TRIES):
        try:
            return optuna.storages.get_storage(optuna.storages.RDBStorage(url, engine_kwargs=options))
        except Exception as error:
            if not _is_made_meanwhile(error) or attempt + 1 == _START_TRIES:
                raise
            time.sleep(0.1 * (attempt + 1))
    raise AssertionError("unreachable")


def _is_made_meanwhile(error: BaseException | None) -> bool:
    """Whether another made the tables between our looking and our making them."""
    while error is not None:
        if re.search("already exists|duplicate key|UNIQUE constraint", str(error)):
            return True
        error = error.__cause__
    return False


def _study(storage: optuna.storages.BaseStorage, name: str) -> int:
    """The id of a study, made where there is none."""
    import optuna

    optuna.create_study(storage=storage, study_name=name, load_if_exists=True, direction="minimize")
    return storage.get_study_id_from_name(name)


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", url)
