"""The similarity profile of a checkpoint: which experts behave alike, from calibration text.

A profile is a safetensors file with four tensors per MoE layer, and says in its metadata which weights it was made
for. It is refused for any others: experts of two fine-tunes of one model need not resemble each other alike.

E experts of a layer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from raymoe.checkpoint.checkpoint import Checkpoint
from raymoe.checkpoint.fingerprint import fingerprint
from raymoe.config import SchedulingConfig, SimilarityMeasure
from raymoe.errors import ConfigError
from raymoe.placement.similarity import MatrixSimilarity, Similarity
from raymoe.whole_file import write_whole

FORMAT = "raymoe-profile-1"
SHORT = 12  # characters of a fingerprint that a message shows
CRITICAL_DEVIATIONS = 3.5  # robust standard deviations from the median: Iglewicz and Hoaglin's bound for outliers
CRITICAL_GAP = 0.1  # and so much in cosine, ten times the error of a mean over 512 tokens: noise makes no outlier


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """One MoE layer.

    Attributes:
        coactivation_EE: float32, cosine between two experts' activation vectors over all tokens (1 where a token
            chose the expert, else 0); 0 for experts that were never chosen.
        output_EE: float32, mean cosine between two experts' outputs on the same hidden states.
        chosen_E: int64, how many tokens chose the expert.
        critical_E: bool, experts that no other resembles, so that none should stand in for them.
    """

    coactivation_EE: np.ndarray
    output_EE: np.ndarray
    chosen_E: np.ndarray
    critical_E: np.ndarray

    @property
    def best_E(self) -> np.ndarray:
        """Each expert's output similarity to the expert that resembles it most."""
        return best_similarity(self.output_EE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """All layers, and what they were measured on.

    Attributes:
        fingerprint: of the weights.
        tokens: how many tokens of text.
        text_sha256: hex, of their ids as little-endian int32.
    """

    layers: tuple[LayerProfile, ...]
    fingerprint: str
    model_type: str
    tokens: int
    text_sha256: str

    def save(self, path: Path) -> None:
        """Write the file, at once or not at all. Raises ConfigError where that can't be done."""
        tensors = {
            f"{name}.{index}": getattr(layer, field)
            for index, layer in enumerate(self.layers)
            for name, field in FIELDS.items()
        }
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "model_type": self.model_type,
            "tokens": str(self.tokens),
            "text_sha256": self.text_sha256,
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path, checkpoint: Checkpoint) -> "Profile":
        """Read a profile of this checkpoint.

        Raises ConfigError for a file that is missing, damaged, or was made for other weights.
        """
        metadata, tensors = read_tensors(Path(path))
        if metadata.get("format") != FORMAT:
            raise ConfigError(
                f'{path} is no profile that this version reads (format "{metadata.get("format", "none")}", expected '
                f'"{FORMAT}"); {WAY_OUT}'
            )
        own, found = fingerprint(checkpoint), metadata.get("fingerprint", "")
        if own != found:
            raise ConfigError(
                f"the profile {path} was made for other weights ({metadata.get('model_type')}, fingerprint "
                f"{found[:SHORT]}…) than {checkpoint.path} ({checkpoint.config.model_type}, {own[:SHORT]}…); {WAY_OUT}"
            )
        try:
            layers = tuple(
                read_layer(tensors, index, layer.num_experts) for index, layer in enumerate(checkpoint.layers)
            )
            return cls(
                layers=layers,
                fingerprint=own,
                model_type=metadata["model_type"],
                tokens=int(metadata["tokens"]),
                text_sha256=metadata["text_sha256"],
            )
        except (KeyError, ValueError) as error:
            raise ConfigError(f"the profile {path} is damaged: {error}; {WAY_OUT}") from error

    def similarity(self, measure: SimilarityMeasure) -> Similarity:
        """Substitutes ranked by this measure; critical experts are never replaced."""
        name = f"{measure}_EE"
        return LayerwiseSimilarity(
            tuple(MatrixSimilarity(getattr(layer, name)[None], layer.critical_E[None]) for layer in self.layers)
        )


@dataclass(frozen=True, slots=True)
class LayerwiseSimilarity:
    """A ``Similarity`` whose layers may have different numbers of experts: one matrix of its own for each."""

    layers: tuple[MatrixSimilarity, ...]

    def preference(self, layer: int, replaced: np.ndarray | int, window: np.ndarray) -> np.ndarray:
        """The rows of the replaced experts, within the window."""
        return self.layers[layer].preference(0, replaced, window)

    def critical_E(self, layer: int) -> np.ndarray | None:
        """As the profile marks them."""
        return self.layers[layer].critical_E(0)


def load_similarity(scheduling: SchedulingConfig, checkpoint: Checkpoint) -> Similarity | None:
    """What ranks substitutes under these settings; None is by gate score.

    Raises ConfigError where the profile can't be used with this checkpoint.
    """
    if scheduling.similarity == "score":
        return None
    assert scheduling.profile is not None, "the configuration asks for one"
    try:
        return Profile.load(scheduling.profile, checkpoint).similarity(scheduling.similarity)
    except ConfigError as error:
        raise ConfigError(f"scheduling.profile: {error}") from error


# --- critical experts -----------------------------------------------------------------------------------


def best_similarity(output_EE: np.ndarray) -> np.ndarray:
    """Each expert's similarity to the other expert that is most like it; -1 where there is no other."""
    others_EE = np.where(np.eye(len(output_EE), dtype=bool), -1.0, output_EE)
    return others_EE.max(axis=1)


def critical_experts(output_EE: np.ndarray) -> np.ndarray:
    """Bool per expert: whether even its nearest neighbour is much farther away than is usual in its layer.

    Outliers only, by median and median absolute deviation (MAD), which outliers do not move. Where all experts are
    about equally unlike each other none is marked, for the alpha window alone has to judge there.
    """
    best_E = best_similarity(output_EE)
    typical = np.median(best_E)
    deviation = 1.4826 * np.median(np.abs(best_E - typical))  # of a normal distribution with this MAD
    return best_E < typical - max(CRITICAL_DEVIATIONS * deviation, CRITICAL_GAP)


# --- files ----------------------------------------------------------------------------------------------

FIELDS = {name.rpartition("_")[0]: name for name in LayerProfile.__slots__}
WAY_OUT = "run `raymoe calibrate` again"


def read_layer(tensors: dict[str, np.ndarray], index: int, experts: int) -> LayerProfile:
    """One layer of a profile. Raises ValueError or KeyError for what is not as it should be."""
    kinds = {"coactivation": np.float32, "output": np.float32, "chosen": np.int64, "critical": np.bool_}
    values = {}
    for name, field in FIELDS.items():
        tensor = tensors[f"{name}.{index}"]
        shape = (experts,) * field.rpartition("_")[2].count("E")
        if tensor.shape != shape or tensor.dtype != kinds[name]:
            raise ValueError(
                f"{name}.{index} is {tensor.dtype} {list(tensor.shape)}, expected {np.dtype(kinds[name])} {list(shape)}"
            )
        values[field] = tensor
    return LayerProfile(**values)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file. Raises ConfigError where it is missing or damaged."""
    if not path.is_file():
        raise ConfigError(f"can't read the profile {path}: no such file; make it with `raymoe calibrate MODEL -o FILE`")
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged, or no safetensors file: {error}; {WAY_OUT}") from error


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file and put it in its place by renaming. Raises ConfigError where that can't be done."""
    write_whole(path, save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata))
