"""Why a place was not rewritten or a value not reused: one enumeration for each part that reports it.

All texts differ, so that a reason is known by its text alone wherever it is printed or counted.
"""

from __future__ import annotations

from enum import Enum


class Reason(str, Enum):
    """Any reason that stands in reports, dumps and decisions."""

    def __str__(self) -> str:
        return str(self.value)


class RefusalReason(Reason):
    """The passes and the binding of a policy: why a place is no site, or a rule cannot have what it asks for."""

    # a summand of a residual sum that is not a site
    NOT_FROM_STREAM = "the summand is not computed from the stream"
    NO_CONTRACTION = "the summand is computed from the stream without any matrix product"
    ENTANGLED = "the branches share a contraction, and one feeds another's input: each became a site of its own"
    TRAJECTORY_INVARIANT = "the value does not depend on the step: it is computed once per trajectory anyway"
    # a span
    NO_COUNTERPART = "the stream behind the span has no counterpart of its shape before it"
    SPAN_IN_PART = "the graph is a part of the model, so that the positions of its layers are not known"
    SPAN_PER_GRAPH = "the graph is a part of the model: the span is of the blocks of this part alone"
    NO_LATENT = "the output does not have the latent's shape and dtype, so that their difference is not defined"
    OTHER_STACK = "the blocks are not in the stack with most FLOPs: name theirs by Where(stack=…)"
    NO_STACK = "no block of the graph lies in this container, or none adds to a stream"
    NO_BLOCKS = "the stack has no such blocks in this graph"
    # a part of a branch, or a strategy that is defined for some branches only
    NO_KEYS = "the branch has no attention op with keys and values of its own"
    NO_CORE = "the branch has no softmax attention op, and the strategy is defined for that alone"
    CAUSAL = "the attention is causal, has dropout, or shares keys among heads"
    OTHER_TOKENS = "the queries and keys are of different tokens, so that they have no window"
    HEAD_SIZE = "blockwise attention supports only heads of 16 to 256 channels, in 16 or 32 bits"
    MOVING_KEYS = "the keys change from step to step, and the paper's bound assumes that they do not: use bound='sound'"
    MOVING_MASK = "the attention mask changes from step to step, and the bound assumes that it does not"
    MIXES_SAMPLES = "the samples of the batch cannot be told apart, so that no half of it can be computed alone"
    ODD_BATCH = "the batch cannot be divided into two halves"
    MOVING_SIZE = "the size of the value is decided by data that change from step to step"
    # a measurement
    NO_PROBE = "the graph has no probe of this name"
    PROBE_WITHIN = "the probe is computed after the value that it decides on: give the policy lag=1"
    NO_GRID = "the probe is filtered, and the places of its tokens on a grid cannot be found"
    NOT_VERIFIED = "the guard asks for the error of verified sites, and no rule verifies one"
    NO_FORECAST = "the guard asks for the error of its forecast, and no rule forecasts the site with store None or bf16"
    PROBE_IN_PART = "the graph is a part of the model, and the guard measures a value of the whole model"


class UnreachedReason(Reason):
    """The analysis of guards: why a policy can never reuse anything at some sites, or at all."""

    NO_RULE = "no rule can ever apply"
    TOTAL_UNKNOWN = "a guard needs the number of steps, and none was given"
    NOISE_UNKNOWN = "a guard needs the noise level, and no scheduler was given that provides it"


class LoweringReason(Reason):
    """The layout of a graph: why it is lowered as variants or in segments."""

    ASKED = "the caller asked for it"
    FEW_ROWS = "the decisions have few distinct rows"
    MANY_ROWS = "the decisions have many distinct rows"
    MEASURES_NOW = "a guard needs a measurement of the same call"


class DecisionReason(Reason):
    """The decision machine: why a site was reused or computed."""

    RULE = "a rule applies"
    NO_RULE = "no rule applies"
    TOTAL_UNKNOWN = "the guard needs the number of steps, which is not known"
    NOISE_UNKNOWN = "the guard needs the noise level, which is not known"
    NOT_MEASURED = "the guard or the forecast needs a measurement, and there is none yet"
    COVERED = "an enclosing site is reused"
    VERIFIED = "a rule compares the computed value with its forecast: the slot stays as it was"
    FORCED = "every decision is forced to compute"
    WILL_BE_READ = "a later step reads the slot that this step fills"
    UNREAD = "no step reads the slot before it is filled again"


class MissReason(Reason):
    """The slots: a rule wanted to reuse, and no value fits."""

    EMPTY = "no value was computed yet in this trajectory"
    CHANGED_INPUT = "the shape, dtype or device of an input changed"
    CHANGED_GRAPH = "the call before ran another graph at this place"
    CHANGED_WEIGHTS = "the call before ran the graph with other weights"
    CHANGED_ATTRIBUTE = "a tensor that is an attribute of the model was replaced or changed in place"
    CHANGED_CONDITIONING = "the cached value was computed for other conditioning"
    BEYOND_END = "the trajectory was given fewer steps"
    NO_WEIGHTS = "the forecast's basis gives no finite weights for these places"
    NOISE_UNKNOWN = "the forecast needs the noise level, which is not known"
    SIZES_NOT_COMPILED = "the variant was compiled later, for other sizes"
    NOT_CAPTURED = "Dynamo ran the call without a captured graph (recompile limit reached, or disabled)"
    OUTSIDE_CALL = "the graph ran outside a call of the compiled model"


class StreamReason(Reason):
    """The streams of a trajectory: why one has no values of its own yet, or none any more."""

    NEW_STREAM = "no call before has the name of this one, or its place in the step"
    NEW_CONDITIONING = "the conditioning is a new object, or was changed in place"
    AMBIGUOUS_STREAM = "the latent may continue either of two streams of one conditioning: name them by cache_context"
    UNREADABLE_INPUT = "an argument holds an object that cannot be read, and perhaps a condition that is not seen"
    TOO_MANY_CALLS = "too many calls of one conditioning have the same timestep"
    CALLED_ONCE = "the stream was called in one step only, and its memory was released"
    EVICTED = "the streams together held more bytes than the limit"


class TrajectoryReason(Reason):
    """The tracking of trajectories: why another one began."""

    FIRST_CALL = "this is the first call"
    NEW_CONDITIONING = "a call has new conditioning, or it was changed in place"
    NEW_LATENT = "the latent does not continue the last one"
    UNREADABLE_INPUT = "a call has an argument that cannot be read, so that its conditioning is not known"
    TIMESTEP_TURNED = "the timestep moved against the direction of the trajectory"
    TIMESTEP_STILL = "the timestep does not move from call to call"
    SCHEDULE_SET = "the scheduler's timesteps were set again"
    REPEATED = "the latent is that of the call before"
    RESET = "the caller reset the model"
