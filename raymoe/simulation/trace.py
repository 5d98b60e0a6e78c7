"""Routing traces: what a model's routers chose in each step, and what had been foretold. ``raymoe record`` writes them.

The file is numpy's NPZ without pickled objects: arrays, and a small JSON of facts. Opening one checks everything, so
that a damaged or foreign file ends in a message instead of a simulation of nonsense.

N steps, L MoE layers, E experts, K experts per token.
"""

import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raymoe.errors import ConfigError
from raymoe.simulation.shape import ModelShape
from raymoe.whole_file import whole

VERSION = 1
KIND = "raymoe routing trace"
MOST_BYTES = 1 << 32  # of an array; a thousand steps of the largest models have less
SUFFIX = ".npz"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingTrace:
    """Decode steps of one sequence, in their order.

    Attributes:
        shape: of the model.
        chosen_NLK: int32, the router's distinct experts, best first.
        scores_NLE: float16 gate scores of all experts; None where the model's rule of routing is not known.
        tokens_N: int32, the token that each step reads; None where there are none.
        foretold_NLK: int32, the experts that the shadow named, -1 where it named none; None without a shadow.
        guessed_N: bool, whether the shadow had guessed the token that the step reads; None without a shadow.
        about: where it comes from, in words by name.

    Raises:
        ConfigError: arrays that don't fit together.
    """

    shape: ModelShape
    chosen_NLK: np.ndarray
    scores_NLE: np.ndarray | None = None
    tokens_N: np.ndarray | None = None
    foretold_NLK: np.ndarray | None = None
    guessed_N: np.ndarray | None = None
    about: dict[str, str]

    def __post_init__(self) -> None:
        steps, shape = len(self.chosen_NLK), self.shape
        by_layer = (steps, shape.layers)
        expected = {
            "chosen_NLK": ((*by_layer, shape.top_k), np.int32),
            "scores_NLE": ((*by_layer, shape.experts), np.float16),
            "tokens_N": ((steps,), np.int32),
            "foretold_NLK": ((*by_layer, shape.top_k), np.int32),
            "guessed_N": ((steps,), np.bool_),
        }
        if not steps:
            raise ConfigError("a routing trace needs at least one step")
        for name, (wanted, dtype) in expected.items():
            array = getattr(self, name)
            if array is not None and (array.shape != wanted or array.dtype != dtype):
                raise ConfigError(
                    f"routing trace: {name} is {array.dtype} {list(array.shape)}, but the model's facts ask for "
                    f"{np.dtype(dtype)} {list(wanted)}; record it again"
                )
        _check_experts("chosen_NLK", self.chosen_NLK, shape.experts, 0)
        if self.foretold_NLK is not None:
            _check_experts("foretold_NLK", self.foretold_NLK, shape.experts, -1)

    @property
    def steps(self) -> int:
        """How many decode steps."""
        return len(self.chosen_NLK)

    @property
    def recall(self) -> float | None:
        """Share of the chosen experts that the shadow had named; None without a shadow."""
        if self.foretold_NLK is None:
            return None
        named_NLKK = self.chosen_NLK[..., :, None] == self.foretold_NLK[..., None, :]
        return float(named_NLKK.any(axis=-1).mean())

    @property
    def agreement(self) -> float | None:
        """Share of the tokens that the shadow had guessed; None without a shadow."""
        return None if self.guessed_N is None else float(self.guessed_N.mean())

    def first(self, steps: int) -> "RoutingTrace":
        """The first steps of it, or all where there are no more."""
        names = ("chosen_NLK", "scores_NLE", "tokens_N", "foretold_NLK", "guessed_N")
        parts: dict[str, Any] = {
            name: None if (array := getattr(self, name)) is None else array[:steps] for name in names
        }
        return replace(self, **parts)

    def priced(self, shape: ModelShape) -> "RoutingTrace":
        """The same routing with other sizes in bytes, for a model of as many layers and experts."""
        return replace(self, shape=shape)


def save(trace: RoutingTrace, path: Path) -> None:
    """Write a trace. Raises ConfigError where the file can't be written."""
    arrays: dict[str, Any] = {
        name: array
        for name in ("chosen_NLK", "scores_NLE", "tokens_N", "foretold_NLK", "guessed_N")
        if (array := getattr(trace, name)) is not None
    }
    facts = {"kind": KIND, "version": VERSION, "shape": trace.shape.as_dict(), "about": trace.about}
    with whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, facts=np.array(json.dumps(facts)), **arrays)


def load(path: Path) -> RoutingTrace:
    """Read a trace. Raises ConfigError for what is none, is damaged, or of another version."""
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise ConfigError(f"can't read the trace {path}: {error.strerror or error}") from error
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
        raise ConfigError(f"{path} is no routing trace, or a damaged one ({error}); make one: raymoe record") from error
    try:
        facts = json.loads(str(arrays.pop("facts").item()))
        kind, version = facts["kind"], facts["version"]
        if kind != KIND or version != VERSION:
            raise ConfigError(f"{path} is of kind {kind!r}, version {version!r}; this reads {KIND!r}, {VERSION}")
        about = {str(name): str(value) for name, value in facts["about"].items()}
        return RoutingTrace(shape=ModelShape(**facts["shape"]), about=about, **arrays)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no routing trace: its facts are not as they should be ({error})") from error


def _check_sizes(path: Path) -> None:
    """Raise ValueError for a file whose arrays would unpack to more than a trace has."""
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            if item.file_size > MOST_BYTES:
                raise ValueError(f"{item.filename} has {item.file_size:,} bytes; at most {MOST_BYTES:,} are read")


def _check_experts(name: str, experts: np.ndarray, count: int, least: int) -> None:
    if experts.size and (experts.min() < least or experts.max() >= count):
        raise ConfigError(f"routing trace: {name} names expert {experts.min()} or {experts.max()} of {count}")
