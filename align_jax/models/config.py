# SPDX-License-Identifier: Apache-2.0
"""What a decoder is: one frozen, hashable description that serves every family.

A family's file turns a Hugging Face configuration into a ModelConfig; the transformer reads nothing
else.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from align_jax.core.choose import choose
from align_jax.core.files import json_kind
from align_jax.models.hf_fields import ROPE_KINDS, rope_unread
from align_jax.models.stacks import Stack, stacks
from align_jax.models.unread import unread

# our own key of config.json, where rotary embeddings depend on it; other programs pass over it
RUN_LENGTH = "align_jax_run_length"
# and of a family of the user's own: where it is found, ``module:name``
OWN_FAMILY = "align_jax_family"


@dataclasses.dataclass(frozen=True)
class Rope:
    """One rotary position embedding.

    Attributes:
        theta: base of the angles.
        rotary_dim: features of a head that turn (even); the rest pass through.
        kind: "default", "linear", "dynamic", "yarn", "llama3" or "longrope".
        options: the scaling's parameters by their Hugging Face names, sorted pairs (hashable).
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    options: tuple[tuple[str, Any], ...] = ()

    def option(self, name: str, default: Any = None) -> Any:
        """Return one of the scaling's parameters."""
        value = dict(self.options).get(name)
        return default if value is None else value

    @property
    def limit(self) -> int:
        """The original context in tokens, beyond which the angles are others; 0: never."""
        positions: int = self.option("max_position_embeddings", 0)
        if self.kind == "longrope":
            return self.option("original_max_position_embeddings", positions)
        return positions if self.kind == "dynamic" else 0


@dataclasses.dataclass(frozen=True)
class Latent:
    """What multi-head latent attention makes queries, keys and values from.

    Attributes:
        rank: width of a token's latent.
        query_rank: of the queries'; 0: they are made from the token itself.
        rope_dim: features of a query, and of the key that all heads share, that turn.
        value_dim: width of a head's values.
    """

    rank: int
    query_rank: int
    rope_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True)
class Delta:
    """The layers that keep a state by the gated delta rule.

    Attributes:
        key_heads, value_heads: of queries and keys, and of values: a multiple of these.
        key_dim, value_dim: their widths.
        taps: tokens that the convolution before the rule sees.
        fused: whether a checkpoint has one map for query, key, value and gate, key head by key
            head, and one for rate and fade.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    fused: bool

    @property
    def repeats(self) -> int:
        """Values a key head."""
        return self.value_heads // self.key_heads

    @property
    def width(self) -> int:
        """Of a key head's query, key and values side by side: what the convolution runs over."""
        return 2 * self.key_dim + self.repeats * self.value_dim


@dataclasses.dataclass(frozen=True)
class Wide:
    """The layers whose heads have a shape of their own: those that see the whole row.

    Attributes:
        head_dim: their features.
        kv_heads: how many have keys and values.
        key_is_value: whether a head's value is its key, before norm and rotation.
    """

    head_dim: int
    kv_heads: int
    key_is_value: bool


@dataclasses.dataclass(frozen=True)
class Streams:
    """Residual streams side by side (``models.altup``).

    Attributes:
        count: how many.
        active: which of them the layers compute.
        scaled: whether it is scaled, feature by feature, before it gates a token's own inputs.
    """

    count: int
    active: int
    scaled: bool


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
        family: Hugging Face ``model_type``; or the user's own family, ``module:name``.
        vocab_size: token ids in use; ``vocab_rows`` >= it are the rows of the embedding table
            (padded to divide the mesh); logits beyond ``vocab_size`` are the lowest float32.
        windows: a window for each layer, in tokens, the token itself included; 0 = the whole row.
        ropes, layer_ropes: the distinct rotary embeddings, and each layer's index among them (-1:
            none).
        rope_interleaved: whether neighboring features turn together, not those half a head apart.
        qk_norm: "" none, "head" over each head's features, "full" over all heads' features.
        qk_norm_turned: whether that follows the rotation.
        latent: of latent attention, whose heads' queries and keys are ``head_dim`` wide, the
            features that turn behind the others.
        delta, delta_layers: the layers that keep a state, where there are such, and their numbers.
        wide, wide_layers: the layers with heads of another shape, and their numbers.
        value_norm: whether values are normalized, head by head, without a scale.
        reused: how many of the last layers attend to the keys and values of the last layer before
            them that is as wide; ``reused_size``: the width of their MLP.
        token_inputs: width of what each layer is given of a token beside the states; 0 = nothing.
        token_rows: tokens that have a row of their own in its table, the others take the first's; 0
            = all.
        streams: where there are several residual streams, what they are.
        laurel_rank: rank of the branch beside attention; 0 = none.
        sparsities: of each layer, the part of its MLP's gates that is to be zero; () = of none.
        layer_scale: whether a layer's output is multiplied by a number of the layer, which is not
            trained.
        query_growth: rate and length by which queries grow with their position: by 1 + rate
            log(1 + n) behind n such lengths.
        attention_gate: whether a sigmoid of the token scales each head's output; it is made with
            the query.
        sinks: whether each head has a learned logit more in its softmax, of no key.
        norm_inputs, norm_outputs: whether the attention's and MLP's inputs and outputs are
            normalized.
        shared_norm: one norm for attention and MLP, whose residual is parallel.
        residual_scale: factor on what attention and MLP add.
        output_scale: factor on the logits.
        head_bias: whether the language-model head has a bias.
        expert_bias: whether the router and the experts' maps have biases.
        glu_limit: where above 0, gate and up are clipped to it, and a gated map is
            (up + 1) * gate * sigmoid(``glu_gain`` * gate).
        routing: "softmax"; "corrected" or "sigmoid", with a bias that corrects the choice alone.
        expert_groups, groups_per_token: the experts stand in so many groups, of which a token
            chooses from so many.
        routed_scale: factor on the chosen experts' sum.
        dense_layers: of a mixture, those without experts; ``dense_size``: their width.
        shared_size: width of the expert that every token passes, 0 = none; ``shared_gate``: whether
            a sigmoid of the token scales it.
        branch_norms: whether that expert and the others have norms of their own before and after
            them, and the router sees the states, normalized without a scale.
        run_length: tokens of the longest text that a run computes with, by which those rotary
            embeddings are chosen that depend on it; 0: within the original context.
        end_tokens: what ends a text by the checkpoint's own files, beside the tokenizer's.
        hf: the Hugging Face configuration it came from, as JSON; exported again with what changed.
    """

    family: str
    vocab_size: int
    vocab_rows: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    activation: str = "silu"
    gated: bool = True
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: bool = False
    norm_inputs: bool = True
    norm_outputs: bool = False
    parallel_residual: bool = False
    shared_norm: bool = False
    residual_scale: float = 1.0
    rope_interleaved: bool = False
    qk_norm: str = ""
    qk_norm_turned: bool = False
    latent: Latent | None = None
    delta: Delta | None = None
    delta_layers: tuple[int, ...] = ()
    wide: Wide | None = None
    wide_layers: tuple[int, ...] = ()
    value_norm: bool = False
    reused: int = 0
    reused_size: int = 0
    token_inputs: int = 0
    token_rows: int = 0
    streams: Streams | None = None
    laurel_rank: int = 0
    sparsities: tuple[float, ...] = ()
    layer_scale: bool = False
    query_growth: tuple[float, int] | None = None
    attention_gate: bool = False
    sinks: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    head_bias: bool = False
    output_scale: float = 1.0
    query_scale: float = 1.0
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    embed_scale: float = 1.0
    learned_positions: bool = False
    position_offset: int = 0
    windows: tuple[int, ...] = ()
    ropes: tuple[Rope, ...] = ()
    layer_ropes: tuple[int, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    normalize_experts: bool = True
    expert_bias: bool = False
    glu_limit: float = 0.0
    glu_gain: float = 1.0
    routing: str = "softmax"
    expert_groups: int = 1
    groups_per_token: int = 1
    routed_scale: float = 1.0
    dense_layers: tuple[int, ...] = ()
    dense_size: int = 0
    shared_size: int = 0
    shared_gate: bool = False
    branch_norms: bool = False
    init_std: float = 0.02
    run_length: int = 0
    end_tokens: tuple[int, ...] = ()
    hf: str = "{}"

    def __post_init__(self) -> None:
        for name in ("windows", "layer_ropes", *(["sparsities"] if self.sparsities else [])):
            if len(getattr(self, name)) != self.num_layers:
                raise ValueError(
                    f"{self.family}: {name} needs {self.num_layers} entries, one a layer; got "
                    f"{len(getattr(self, name))}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads, {self.num_heads} "
                f"(which are not divisible by it), got {self.num_kv_heads}"
            )
        if self.delta and self.delta.value_heads % self.delta.key_heads:
            raise ValueError(
                "linear_num_value_heads: expected a multiple of linear_num_key_heads, "
                f"{self.delta.key_heads}, got {self.delta.value_heads}"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: expected at most the number of experts, {self.num_experts}, "
                f"got {self.experts_per_token}"
            )
        if len(self.dense_layers) >= self.num_layers:
            raise ValueError(
                "first_k_dense_replace, decoder_sparse_step, mlp_only_layers: expected fewer dense "
                f"layers than num_hidden_layers, {self.num_layers}, got {len(self.dense_layers)}"
            )
        if self.num_experts % self.expert_groups or self.groups_per_token > self.expert_groups:
            raise ValueError(
                f"n_group, topk_group: expected a divisor of the {self.num_experts} experts, and "
                f"at most that, got {self.expert_groups} and {self.groups_per_token}"
            )
        if self.vocab_rows < self.vocab_size:
            raise ValueError(
                f"{self.family}: vocab_rows {self.vocab_rows} < vocab_size {self.vocab_size}"
            )

    def differences(self, other: ModelConfig) -> list[tuple[str, Any, Any]]:
        """Return what two models compute differently of equal weights and in which shapes they
        differ: each field with both values.  What only a start, a run, texts, files, or a longest
        row that no table bounds go by is none of it."""
        unlike = {"init_std", "run_length", "end_tokens", "hf"}
        unlike |= set() if other.learned_positions else {"max_positions"}
        pairs = (
            (field.name, getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
            if field.name not in unlike
        )
        return [(name, a, b) for name, a, b in pairs if a != b]

    @property
    def sizes(self) -> dict[str, int]:
        """The dimension letters' sizes (core/schema.py; d is D again, f a shared expert's
        width, G that of dense layers among such with experts, X a learned table's positions; of
        latent attention q is the queries' rank, c the latent's, z that with the shared key's width,
        v a value's width, w that with a key's that does not turn; of the delta rule g and u are
        its key and value heads, n and o their widths, s the convolution's taps, m and p the
        outputs a key head of its fused maps; t is a query's width with its gate's; k and l are
        the heads with keys of wide layers and their width, j the width of the MLPs that follow
        reused keys, e that of a layer's own inputs, Y the rows of their table; a and b are the
        residual streams, A their square, i the rank of the branch beside attention)."""
        wide = self.wide or Wide(0, 0, False)
        latent = self.latent or Latent(0, 0, 0, self.head_dim)
        delta = self.delta or Delta(1, 1, 0, 0, 0, False)
        return {
            "a": self.num_streams,
            "b": self.num_streams,
            "A": self.num_streams**2,
            "i": self.laurel_rank,
            "Y": self.token_rows or self.vocab_rows,
            "q": latent.query_rank,
            "c": latent.rank,
            "z": latent.rank + latent.rope_dim,
            "v": latent.value_dim,
            "w": self.still_dim + latent.value_dim,
            "g": delta.key_heads,
            "u": delta.value_heads,
            "n": delta.key_dim,
            "o": delta.value_dim,
            "s": delta.taps,
            "m": delta.width + delta.repeats * delta.value_dim,
            "p": 2 * delta.repeats,
            "t": self.query_dim,
            "k": wide.kv_heads,
            "l": wide.head_dim,
            "j": self.reused_size,
            "e": self.token_inputs,
            "D": self.hidden_size,
            "d": self.hidden_size,
            "H": self.num_heads,
            "K": self.num_kv_heads,
            "h": self.head_dim,
            "F": self.intermediate_size,
            "V": self.vocab_rows,
            "f": self.shared_size,
            "G": self.dense_size,
            "E": self.num_experts,
            "L": self.num_layers,
            "X": self.max_positions + self.position_offset,
        }

    @property
    def query_dim(self) -> int:
        """Outputs a head of the map that makes queries."""
        return self.head_dim * (2 if self.attention_gate else 1)

    @property
    def num_streams(self) -> int:
        """Residual streams side by side."""
        return self.streams.count if self.streams else 1

    @property
    def sparsity(self) -> float:
        """Of a kind of layers, the part of its MLP's gates that is to be zero."""
        return self.sparsities[0] if self.sparsities else 0.0

    @property
    def width(self) -> str:
        """Whose keys and values a kind of layers may reuse: "wide" ones, or the others'."""
        return "wide" if self.wide else ""

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def still_dim(self) -> int:
        """Features of a head's key that do not turn, in latent attention."""
        return self.head_dim - self.latent.rope_dim if self.latent else 0

    @property
    def cached(self) -> tuple[int, int, int]:
        """Heads and widths of what a cache holds of a token: a key's and a value's; of latent
        attention the latent's and the shared key's."""
        if self.latent:
            return 1, self.latent.rank, self.latent.rope_dim
        return self.num_kv_heads, self.head_dim, self.head_dim

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each layer is: with or without experts, with sparse gates or not, attending (with
        wide heads, to reused keys) or keeping a state."""
        layers = range(self.num_layers)
        apart = {
            "delta": self.delta_layers,
            "reused": layers[self.num_layers - self.reused :],
            "wide": self.wide_layers,
        }
        sparse = [f"sparse{part}" if part else "" for part in self.sparsities] or [""] * len(layers)
        words = (
            [
                *(word for word, of in apart.items() if n in of),
                sparse[n],
                "dense" if n in self.dense_layers else "experts",
            ]
            for n in layers
        )
        return tuple(" ".join(filter(None, of_one)) for of_one in words)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The layers in the loops that run them; one kind where all are alike."""
        return stacks(self.kinds)

    def of_kind(self, kind: str) -> ModelConfig:
        """Return what the layers of this kind are."""
        words, changes = kind.split(), dict[str, Any]()
        if self.delta and "delta" not in words:
            changes |= dict(delta=None, delta_layers=())
        if self.wide:
            changes |= self._of_width(kind)
        if self.sparsities:
            own = self.sparsities[self.kinds.index(kind)]
            changes["sparsities"] = (own,) * self.num_layers
        if "reused" in words:
            size = "shared_size" if self.num_experts else "intermediate_size"
            changes |= {"reused": self.num_layers, size: self.reused_size}
        elif self.reused:
            changes["reused"] = 0
        if "dense" in words:
            changes |= dict(
                num_experts=0,
                experts_per_token=0,
                shared_size=0,
                expert_groups=1,
                groups_per_token=1,
                intermediate_size=self.dense_size,
            )
        return dataclasses.replace(self, **changes)

    def _of_width(self, kind: str) -> dict[str, Any]:
        """Return what differs where some layers' heads have another shape: each kind then has one
        window and one rotary embedding."""
        first, every = self.kinds.index(kind), self.num_layers
        changes: dict[str, Any] = dict(
            windows=(self.windows[first],) * every, layer_ropes=(self.layer_ropes[first],) * every
        )
        if self.wide and "wide" in kind.split():
            return changes | dict(head_dim=self.wide.head_dim, num_kv_heads=self.wide.kv_heads)
        return changes | dict(wide=None, wide_layers=())

    @property
    def kept(self) -> tuple[str, ...]:
        """What each layer keeps of a token: "delta", a state; "wide" or "", keys and values."""
        words = ("delta", self.delta_layers), ("wide", self.wide_layers)
        return tuple(
            next((word for word, of in words if n in of), "") for n in range(self.num_layers)
        )

    @property
    def places(self) -> tuple[int, ...]:
        """Each layer's number among those that keep what it keeps; of one that reuses keys and
        values, that of the layer whose they are."""
        kept, own = self.kept, self.num_layers - self.reused
        return tuple(
            kept[: min(n, own)].count(kept[n]) - (n >= own) for n in range(self.num_layers)
        )

    @property
    def attending(self) -> tuple[tuple[ModelConfig, int, int], ...]:
        """Of the layers that attend: what they are, their window, how many of these there are."""
        pairs = collections.Counter(zip(self.kinds, self.windows))
        each = ((self.of_kind(kind), window, count) for (kind, window), count in pairs.items())
        return tuple(one for one in each if not one[0].delta)

    @property
    def limit(self) -> int:
        """The original context, where rotary embeddings change beyond it; else 0."""
        return max((rope.limit for rope in self.ropes), default=0)

    @property
    def longest(self) -> int:
        """Tokens of the longest text: the positions; where rotary embeddings depend on the run's
        length, that length."""
        if not self.limit:
            return self.max_positions
        return min(self.run_length or self.limit, self.max_positions)

    def rope_note(self) -> str:
        """Say what was chosen by the run's length; "" where nothing depends on it."""
        kinds = sorted({rope.kind for rope in self.ropes if rope.limit})
        if not kinds:
            return ""
        side, sign = ("long", ">") if self.run_length > self.limit else ("short", "<=")
        return (
            f"rotary embedding ({', '.join(kinds)}): the {side} factors for every row, as "
            f"max_length = {self.run_length} {sign} original_max_position_embeddings = "
            f"{self.limit}; serve what is exported with texts "
            f"{'beyond' if side == 'long' else 'within'} that (vLLM: --max-model-len)"
        )

    @property
    def pad_token(self) -> int | None:
        """What fills rows, as the Hugging Face configuration has it."""
        found: dict[str, Any] = json.loads(self.hf)
        return found.get("text_config", found).get("pad_token_id")

    def with_pad(self, token: int) -> ModelConfig:
        """Return the same model with this ``pad_token``, before which transformers' sequence
        classifiers read a row's score."""
        found: dict[str, Any] = json.loads(self.hf)
        found.get("text_config", found)["pad_token_id"] = token
        return dataclasses.replace(self, hf=json.dumps(found, sort_keys=True))

    def untied(self) -> ModelConfig:
        """Return the same model with a head of its own."""
        said = json.dumps(json.loads(self.hf) | {"tie_word_embeddings": False}, sort_keys=True)
        return dataclasses.replace(self, tied=False, hf=said)

    def padded(self, multiple: int) -> ModelConfig:
        """Return the same model with its embedding table's rows padded to a multiple (so that a
        mesh divides them)."""
        return dataclasses.replace(self, vocab_rows=-(-self.vocab_size // multiple) * multiple)

    def to_hf(
        self, *, architecture: str | None = None, dtype: str | None = None, **changes: Any
    ) -> dict[str, Any]:
        """Return the Hugging Face configuration: the one it came from, with what changed since.

        Args:
            architecture: class name for ``architectures``; default: what it was.
            dtype: the weights' type as stored.
            changes: further keys (num_labels, ...).
        """
        kind = OWN_FAMILY if ":" in self.family else "model_type"
        hf = json.loads(self.hf) | {kind: self.family}
        text = hf.get("text_config", hf)
        text["vocab_size"] = self.vocab_size
        if self.token_inputs and not self.token_rows:
            text["vocab_size_per_layer_input"] = self.vocab_size
        for part in (hf, text):  # the weights that they described are no more
            part.pop("quantization_config", None)
            part.pop("compression_config", None)
        if self.limit and self.run_length:
            hf[RUN_LENGTH] = self.run_length
        if architecture is not None:
            hf["architectures"] = [architecture]
        if dtype is not None:
            for part in (hf, text):
                part.pop("torch_dtype", None)
                part["dtype"] = dtype
        return hf | changes


def complete(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in a Hugging Face configuration's defaults and bring old spellings to the present ones.

    Configurations are saved without what equals the default, and older ones spell positions as
    ``rope_theta`` and ``rope_scaling``; transformers knows both.

    Raises:
        ValueError: transformers refuses it.
    """
    from transformers import CONFIG_MAPPING  # here, because importing it takes seconds

    known = {
        # copied, since transformers writes into nested objects
        key: copy.deepcopy(value)
        for key, value in hf.items()
        if key not in ("transformers_version", "_name_or_path")
    }
    try:
        for key in unread(hf):
            del known[key]
        config = CONFIG_MAPPING[hf["model_type"]].from_dict(known)
        if getattr(config, "rope_parameters", None):
            config.standardize_rope_params()  # as its modules do: again, now that all is known
        return config.to_dict()
    # its dataclasses and each model's own code raise what they like
    except Exception as error:
        said = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"transformers refuses this {hf['model_type']} configuration: {said}"
        ) from error


def rope_from_hf(
    parameters: Mapping[str, Any], head_dim: int, max_positions: int, partial: bool = False
) -> Rope:
    """Turn ``rope_parameters`` into a Rope.

    Args:
        parameters: as transformers completes them.
        head_dim: features of a head.
        max_positions: the model's.
        partial: whether transformers' modules of the family let a part of a head's features turn.

    Raises:
        ValueError: an unknown ``rope_type``; a scaling that lacks a parameter, or has one that
            cannot be.
    """
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_parameters: expected an object, got {json_kind(parameters)}")
    options = dict(parameters)
    kind = options.pop("rope_type", options.pop("type", "default"))
    needed = choose(ROPE_KINDS, kind, "rope_parameters.rope_type")
    if missing := [name for name in ("rope_theta", *needed) if options.get(name) is None]:
        raise ValueError(
            f"rope_parameters (rope_scaling) of type {kind!r}: expected {', '.join(missing)} too"
        )
    if options.pop("llama_4_scaling_beta", None):
        raise ValueError(
            "rope_parameters.llama_4_scaling_beta: expected 0, or no such key, as this family does "
            "not scale queries by their position (ministral3 does)"
        )
    theta = float(options.pop("rope_theta"))
    part = options.pop("partial_rotary_factor", 1.0)
    if kind == "proportional":  # all features have angles, of which the slowest are zero
        options["partial_rotary_factor"], part = part, 1.0
    if part != 1 and not partial:
        raise ValueError(
            f"partial_rotary_factor: expected 1, or none, as transformers' modules of this family "
            f"turn whole heads; got {part}"
        )
    if passed := rope_unread(kind, options, max_positions):
        raise ValueError(
            f"rope_parameters (rope_scaling) of type {kind!r}: expected no "
            f"{', '.join(sorted(passed))}, which such a rotary embedding passes over"
        )
    rotary_dim = int(head_dim * part)
    if rotary_dim % 2 or rotary_dim < (4 if kind == "dynamic" else 2):
        raise ValueError(
            f"head_dim: expected an even number of features that turn, got {rotary_dim} (of "
            f"{head_dim} a head)"
        )
    for name in ("short_factor", "long_factor"):
        if name in needed and len(options[name]) != rotary_dim // 2:
            raise ValueError(
                f"rope_parameters.{name}: expected {rotary_dim // 2} factors (half the features "
                f"that turn), got {len(options[name])}"
            )
    if kind == "llama3" and options["low_freq_factor"] >= options["high_freq_factor"]:
        raise ValueError("rope_parameters: expected low_freq_factor below high_freq_factor")
    if kind != "default":
        options.setdefault("max_position_embeddings", max_positions)
    frozen = (
        tuple(
            sorted(
                (key, tuple(value) if isinstance(value, (list, tuple)) else value)
                for key, value in options.items()
            )
        )
        if kind != "default"
        else ()
    )
    return Rope(theta=theta, rotary_dim=rotary_dim, kind=kind, options=frozen)


def ropes_by_kind(full: Mapping[str, Any], head_dims: Mapping[str, int]) -> dict[str, Any]:
    """Read what each kind of layer has as a rotary embedding, and which of them each layer has.

    Args:
        full: the configuration, completed.
        head_dims: kind of layer -> features of a head.

    Raises:
        ValueError: as ``rope_from_hf``; YaRN's ``truncate``, which transformers passes over here.
    """
    types, parts = full["layer_types"], full["rope_parameters"]
    if flat := sorted(key for key, part in parts.items() if not isinstance(part, Mapping)):
        raise ValueError(
            "rope_parameters: expected an object for each kind of layer and nothing beside them, "
            f"which transformers passes over; got {', '.join(flat)} too"
        )
    for kind, part in parts.items():
        if part["rope_type"] == "yarn" and not part.get("truncate", True):
            raise ValueError(
                f"rope_parameters.{kind}.truncate: expected true, or no such key, since "
                "transformers passes over it where kinds of layers differ; got false"
            )
    kinds, positions = sorted(set(types)), full["max_position_embeddings"]
    return dict(
        ropes=tuple(rope_from_hf(parts[kind], head_dims[kind], positions) for kind in kinds),
        layer_ropes=tuple(map(kinds.index, types)),
    )


def decoder_config(
    hf: Mapping[str, Any], full: Mapping[str, Any], *, partial_rotary: bool = False, **changes: Any
) -> ModelConfig:
    """Read the keys that Llama-like families share, and let a family override what differs.

    Args:
        hf: the configuration as it was saved.
        full: the same completed with defaults.
        partial_rotary: as ``rope_from_hf`` takes it.
        changes: ModelConfig fields that differ from Llama's reading.
    """
    heads = full["num_attention_heads"]
    head_dim = full.get("head_dim") or full["hidden_size"] // heads
    derived = not hf.get("head_dim") and head_dim == full["hidden_size"] // heads
    if derived and "head_dim" not in changes and full["hidden_size"] % heads:
        raise ValueError(
            f"hidden_size: expected a multiple of num_attention_heads, {heads}, or a head_dim; got "
            f"{full['hidden_size']}"
        )
    layers = full["num_hidden_layers"]
    max_positions = full["max_position_embeddings"]
    window = full.get("sliding_window") or 0
    types = full.get("layer_types")
    if types is not None and window == 0 and "sliding_attention" in types:
        raise ValueError(
            "sliding_window: expected a window in tokens, since layer_types names layers of "
            f"sliding_attention; got {json.dumps(full.get('sliding_window'))}"
        )
    if types is not None and "linear_attention" in types and "delta" not in changes:
        raise ValueError(
            "layer_types: expected 'full_attention' or 'sliding_attention', which the layers of "
            f"{full['model_type']} are; got 'linear_attention'"
        )
    windows = (
        (window,) * layers
        if types is None
        else tuple(window if kind == "sliding_attention" else 0 for kind in types)
    )
    fields = dict(
        family=full["model_type"],
        vocab_size=full["vocab_size"],
        vocab_rows=full["vocab_size"],
        num_layers=layers,
        hidden_size=full["hidden_size"],
        num_heads=heads,
        num_kv_heads=full.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        # where every layer has experts, these have a width of their own
        intermediate_size=full.get("intermediate_size"),
        max_positions=max_positions,
        activation=full.get("hidden_act", "silu"),
        norm_eps=full.get("rms_norm_eps", 1e-6),
        attention_bias=bool(full.get("attention_bias", False)),
        output_bias=bool(full.get("attention_bias", False)),
        mlp_bias=bool(full.get("mlp_bias", False)),
        tied=bool(full.get("tie_word_embeddings", False)),
        query_scale=head_dim**-0.5,
        windows=windows,
        init_std=full.get("initializer_range", 0.02),
        layer_ropes=(0,) * layers,
        hf=json.dumps(dict(hf), sort_keys=True),
    )
    if "ropes" not in changes:
        parameters = full["rope_parameters"]
        fields["ropes"] = (rope_from_hf(parameters, head_dim, max_positions, partial_rotary),)
    return ModelConfig(**(fields | changes))
