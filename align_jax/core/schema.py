# SPDX-License-Identifier: Apache-2.0
"""What passes between the parts: an example, a batch, a model's outputs.

Dimension letters, the same in every file:

    N rows                     B groups (prompts)     H query heads       F intermediate size
    T tokens in a row          R responses            K key-value heads   V vocabulary
    P loss positions in a row  M microbatches         h head dim          L layers
    S response slots in a row  D hidden size          E experts

A *group* is one prompt with its R responses.  Rows hold whole groups: ``B * R == N * S``, and
response ``r`` of group ``b`` is slot ``(b * R + r) % S`` of row ``(b * R + r) // S``; so ``[N, S]``
reshapes to ``[B, R]`` without moving data.  In the plain layout S = 1 and a group's responses are R
consecutive rows; in the packed layouts S is a multiple of R.

Index ``t`` of any ``[N, T]`` array speaks about token ``t`` given what precedes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int

# {"role": "system" | "user" | "assistant" | "tool", "content": text}; what else the chat template
# reads (tool_calls, name, reasoning_content, ...); "loss": False on a turn that is not learned
Message = Mapping[str, Any]

Step = tuple[str, float | None]  # its text, and whether it is right: from 0 to 1, None = unknown


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt with its responses and what people said of them, before any tokenizer.

    Attributes:
        prompt: messages, or plain text where the data has no turns.
        responses: R responses; of a pair the chosen one first, of a ranking the best first.  A
            response is text (one assistant turn), or messages, of which the assistant's carry the
            loss.
        label: unpaired feedback: was the response desirable?
        scores: a reward for each response (any scale, higher is better).
        steps: of one response whose steps are labeled, each of them.
        margin: by how much chosen is better than rejected, in units of reward; 0 where unknown.
        weight: this example's weight in the loss.
        source: where it came from, ``file:line`` or ``name[index]``; every error about it starts
            with this.
        extras: columns kept for rewards and for writing samples (a gold answer, an id).
        template: what the chat template is given beside the messages: tools, documents, and keyword
            arguments such as enable_thinking.
    """

    prompt: tuple[Message, ...] | str
    responses: tuple[str | tuple[Message, ...], ...]
    label: bool | None = None
    scores: tuple[float, ...] | None = None
    steps: tuple[Step, ...] | None = None
    margin: float = 0.0
    weight: float = 1.0
    source: str = ""
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Batch(NamedTuple):
    """One step's rows: numpy on the host, global arrays sharded over the rows on the devices.

    A field that the objective does not need is None (an empty subtree, so it costs nothing and is
    not transferred).
    """

    tokens: Int[Any, "N T"]
    segment_ids: Int[Any, "N T"]  # 0 = padding; equal ids attend to each other, causally
    # rotary position: restarts in each response, continues after a shared prompt
    positions: Int[Any, "N T"]
    # the index whose hidden state predicts this token; 0 where there is none
    source_index: Int[Any, "N T"]
    loss_mask: Bool[Any, "N T"]  # true on response tokens, the end-of-turn token included
    # the row's response slot that a token counts towards (0 where loss_mask is false)
    slot: Int[Any, "N T"]
    # indices t with loss_mask, ascending; T (out of range) pads.  P is the head's budget
    loss_index: Int[Any, "N P"]
    lengths: Int[Any, "B R"]  # loss tokens in each response: the sums of loss_mask by slot
    weight: Float[Any, "B"]  # 0 for a filler group
    # shared prompt segment this token may attend to as well; 0 = none
    prefix_ids: Int[Any, "N T"] | None = None
    example_index: Int[Any, "B"] | None = None  # row of the data set, for reports; -1 for a filler
    # index t in its row of a response's last real token (score heads)
    last_index: Int[Any, "B R"] | None = None
    label: Bool[Any, "B"] | None = None  # desirable?
    scores: Float[Any, "B R"] | None = None  # rewards that came with the data or from a rollout
    margin: Float[Any, "B"] | None = None
    # is the step that ends here right? from 0 to 1; the loss mask is true at ends of steps alone
    step_labels: Float[Any, "N T"] | None = None
    reference_token_logps: Float[Any, "N T"] | None = None  # cached: the reference is then not run
    guide_token_logps: Float[Any, "N T"] | None = None  # of a policy that rewards tokens
    old_token_logps: Float[Any, "N T"] | None = None  # of the behavior policy
    # of what drew the samples, and what corrects for their difference (losses.sampler)
    sampler_token_logps: Float[Any, "N T"] | None = None
    sampler_ratio: Float[Any, "N T"] | Float[Any, "B R"] | None = None  # of sequences [B, R]
    advantages: Float[Any, "N T"] | None = None
    returns: Float[Any, "N T"] | None = None
    old_values: Float[Any, "N T"] | None = None
    # value behind a response that was cut off; 0 behind one that ended
    final_values: Float[Any, "B R"] | None = None
    # prompt i with another prompt's response (R = 1): forward passes without gradients
    mismatched: Batch | None = None
    # text beside a rollout (R = 1), for PPO-ptx
    text: Batch | None = None


class Outputs(NamedTuple):
    """What a model says of a batch; float32, in nats.  Zero where ``loss_mask`` is false.

    The optional fields are computed only where an objective's row in the table asks for them
    (``needs``).
    """

    token_logps: Float[Any, "N T"]
    logps: Float[Any, "B R"]  # sums of token_logps over each response
    lengths: Int[Any, "B R"]
    entropy: Float[Any, "N T"] | None = None  # of the next-token distribution
    # policy outputs only: 1 where no token is more probable than the response's, else 0
    most_probable: Float[Any, "N T"] | None = None
    log_sum_sq: Float[Any, "N T"] | None = None  # log sum_v p_v^2
    # policy outputs only: KL(reference || policy) of the next-token distribution
    kl: Float[Any, "N T"] | None = None
    # policy outputs only: a generalized Jensen-Shannon divergence from the reference's distribution
    divergence: Float[Any, "N T"] | None = None
    values: Float[Any, "N T"] | None = None  # value head, at the index that predicts token t
    scores: Float[Any, "B R"] | None = None  # score head, at each response's last token
    step_scores: Float[Any, "N T"] | None = None  # score head, at token t itself
