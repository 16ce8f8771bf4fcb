"""The reasons why a candidate was not rewritten or a value not reused: one Enum for each part that reports them.

All texts differ, so that a printed or counted reason is identified by its text.
"""

from __future__ import annotations

from enum import Enum


class Reason(str, Enum):
    """Base of the reasons in reports, dumps and decisions."""

    def __str__(self) -> str:
        return str(self.value)


class RefusalReason(Reason):
    """Passes: why a candidate is not a site, or why a strategy or measurement is not available at a site."""

    # a summand of a residual sum that is not a site
    NOT_FROM_STREAM = "the summand is not computed from the stream"
    NO_CONTRACTION = "the summand is computed from the stream without any matrix product"
    ENTANGLED = "the branches share a contraction, and one feeds another's input: each became a site of its own"
    TRAJECTORY_INVARIANT = "the value does not depend on the step: it is computed once per trajectory anyway"
    # a span
    NO_COUNTERPART = "the stream after the span has no counterpart of its shape before it"
    SPAN_IN_PART = "the graph is a part of the model, so the positions of its layers are not known"
    SPAN_PER_GRAPH = "the graph is a part of the model: the span has only the blocks of this part"
    OUTPUT_IN_PART = "the graph is a part of the model, so its output need not be that of the model"
    GRAPH_BREAK = "a graph break: a branch that begins in one graph and ends in another is not measured"
    NO_LATENT = "the output does not have the latent's shape and dtype, so their difference is not defined"
    OTHER_STACK = "the blocks are not in the stack with most FLOPs: select their stack with Where(stack=…)"
    NO_STACK = "no block of the graph is in this container, or none adds to a stream"
    NO_BLOCKS = "the stack has no such blocks in this graph"
    # a strategy that is defined for some branches only
    NO_KEYS = "the branch has no attention op with keys and values of its own"
    NO_CORE = "the branch has no softmax attention op, which the strategy needs"
    CAUSAL = "the attention is causal, has dropout, or shares keys among heads"
    OTHER_TOKENS = "the queries and keys belong to different tokens, so a window is not defined"
    OTHER_GRID = "the grid that was given for the window has another number of tokens than the attention"
    NO_TOKEN_GRID = "the graph does not show where the tokens are in the latent: give the window a grid"
    OTHER_AXES = "the window has another number of axes than the grid of the tokens"
    NO_TEXT_TOKENS = "the graph does not show which tokens are text, which a window must leave visible"
    HEAD_SIZE = "blockwise attention supports only heads of 16 to 256 channels, in 16 or 32 bits"
    MOVING_KEYS = "the keys change from step to step, and the paper's bound assumes that they do not: use bound='sound'"
    NO_CONDITION_KEYS = "the graph does not show which keys belong to the condition, or not how many they are"
    MOVING_KEYS_ON_CUDA = (
        "the keys change from step to step: measuring by how much takes about 88 launches a call, longer than attention"
    )
    MOVING_MASK = "the attention mask changes from step to step, and the bound assumes that it does not"
    MIXES_SAMPLES = "the samples of the batch cannot be separated, so half of the batch cannot be computed alone"
    MIXES_TOKENS = "a token of the output depends on other tokens of the input, or the graph does not show otherwise"
    NO_TOKENS = "the value has no dimension of tokens whose number is constant and above 1"
    WITHIN_HALF = "the state belongs to the whole batch, and another rule computes the model for half of it"
    ODD_BATCH = "the batch cannot be divided into two halves"
    MOVING_SIZE = "the size of the value depends on data that change from step to step"
    OVER_BUDGET = "its slot exceeds the memory budget, and it saves less time per byte than the sites that are cached"
    # a measurement
    NO_PROBE = "the graph has no probe of this name"
    PROBE_WITHIN = "the probe is computed after the value that it decides: give the policy lag=1"
    NO_GRID = "the guard filters the probe, but the positions of its tokens on a grid are not known"
    NOT_VERIFIED = "the guard needs the error of verified sites, but no rule verifies a site"
    NO_FORECAST = "the guard needs the error of a forecast, but no rule forecasts the site with store None or bf16"
    PROBE_IN_PART = "the guard measures a value of the whole model, but the graph is a part of it"


class UnreachedReason(Reason):
    """The analysis of guards: why a policy can never reuse some sites, or any site."""

    NO_RULE = "no rule can ever apply"
    TOTAL_UNKNOWN = "a guard needs the number of steps, but none was given"
    NOISE_UNKNOWN = "a guard needs the noise level, but no scheduler was given that provides it"


class LoweringReason(Reason):
    """The partition of a graph: why it is lowered as variants or as segments."""

    ASKED = "the caller requested it"
    FEW_ROWS = "the decisions have few distinct rows"
    MANY_ROWS = "the decisions have many distinct rows"
    MEASURES_NOW = "a guard needs a measurement of the same call"


class DecisionReason(Reason):
    """Decisions: why a site was reused or computed."""

    RULE = "a rule applies"
    NO_RULE = "no rule applies"
    TOTAL_UNKNOWN = "the guard needs the number of steps, which is not known"
    NOISE_UNKNOWN = "the guard needs the noise level, which is not known"
    NOT_MEASURED = "the guard or the forecast needs a measurement that is not available yet"
    COVERED = "an enclosing site is reused"
    VERIFIED = "a rule compares the computed value with its forecast: the slot is not updated"
    FORCED = "every decision is forced to compute"
    WILL_BE_READ = "a later step reads the slot that this step fills"
    UNREAD = "no step reads the slot before it is filled again"


class MissReason(Reason):
    """Misses: why a rule could not reuse a value."""

    EMPTY = "no value was computed yet in this trajectory"
    CHANGED_INPUT = "the shape, dtype or device of an input changed"
    CHANGED_GRAPH = "the previous call ran another graph at this position"
    CHANGED_WEIGHTS = "the previous call ran the graph with other weights"
    CHANGED_ATTRIBUTE = "a tensor attribute of the model was replaced or changed in place"
    CHANGED_UNKNOWN = "a tensor that a hook or a context variable may provide was replaced or changed in place"
    CHANGED_CONDITIONING = "the cached value was computed for other conditioning"
    BEYOND_END = "the step is beyond the number of steps that was given"
    NO_WEIGHTS = "the forecast's basis gives no finite weights for these places"
    NOISE_UNKNOWN = "the forecast needs the noise level, which is not known"
    SIZES_NOT_COMPILED = "the variant was compiled later, for other sizes"
    NOT_CAPTURED = "Dynamo ran the call without a captured graph (recompile limit reached, or disabled)"
    OUTSIDE_CALL = "the graph ran outside a call of the compiled model"


class StreamReason(Reason):
    """Streams: why a stream has no cached values."""

    NEW_STREAM = "no earlier call has the same name, or the same position in its step"
    NEW_CONDITIONING = "the conditioning is a new object, or was changed in place"
    MOVED_ONCE = (
        "a tensor was replaced: it counts as input that moves from step to step if the next step replaces it too"
    )
    AMBIGUOUS_STREAM = "the latent may continue two streams with the same conditioning: name them with cache_context"
    UNREADABLE_INPUT = "an argument contains an object that cannot be inspected and may contain conditioning"
    TOO_MANY_CALLS = "too many calls with the same conditioning have the same timestep"
    CALLED_ONCE = "the stream was called in one step only, and its slots were released"
    EVICTED = "the slots of all streams together exceeded the limit"


class TrajectoryReason(Reason):
    """Trajectories: why a new one began."""

    FIRST_CALL = "this is the first call"
    NEW_CONDITIONING = "a call has new conditioning, or it was changed in place"
    NEW_LATENT = "the latent does not continue the last one"
    UNREADABLE_INPUT = "a call has an argument that cannot be inspected, so its conditioning is not known"
    TIMESTEP_TURNED = "the timestep moved against the direction of the trajectory"
    TIMESTEP_STILL = "the timestep does not change from call to call"
    SCHEDULE_SET = "the scheduler's timesteps were set again"
    REPEATED = "the latent is the same as in the previous call"
    RESET = "the caller reset the model"


class TableReason(Reason):
    """Step tables: why a graph has none or does not read it, why rows were computed anew or weights not released."""

    # there is no table
    NO_TIMESTEP = "no input of the graph is the timestep of the call"
    NO_VALUES = "no matrix product depends on the timestep and the conditioning alone"
    ON_DEVICE = "the timestep is on a GPU and no entry of a scheduler's timesteps: reading it would synchronise"
    NOT_TOLD = "the values depend on the conditioning and no scheduler tells further timesteps: a row is read only once"
    WHOLE_NUMBER = "the values depend on the conditioning and the timestep is an int, not a tensor: no batch of rows"
    # no step reads it
    NOT_READ = "a segment computes them that runs before the decision to reuse, or in the same way in all steps"
    NOT_NEEDED = "a step that reuses computes nothing from them"
    # rows are computed anew
    NEW_WEIGHTS = "a weight was replaced or changed in place"
    NEW_CONDITIONING = "the rows belong to other conditioning"
    UNREADABLE = "the timestep of the call cannot be read without synchronising with a GPU"
    NOT_BATCHED = "an op cannot be batched over the steps, so rows are computed one at a time"
    OVER_LIMIT = "the rows exceeded the limit of memory, and the oldest ones were dropped"
    # weights stay in memory
    OFF_CPU = "a weight is not in the CPU's memory, so it is not released"
    NOT_PLAIN = "a weight is a tensor subclass, not strided, or an inference tensor, so it is not released"
    SHARED_STORAGE = "a weight shares its storage with another tensor or fills only a part of it, so it is not released"
    FILES_IN_MEMORY = "the folder of temporary files is in memory, so weights are not released: set TMPDIR"
    NO_SPACE = "the folder of temporary files is full or cannot be written, so weights are not released: set TMPDIR"
    PART_OF_MODEL = "a captured graph is not the whole model, so it is unknown who reads its weights: none is released"


class GraphReason(Reason):
    """CUDA graphs: why a variant ran without one."""

    # in this call
    WARM_UP = "the variant is run twice before it is captured"
    MOVED_WEIGHTS = "a weight is at another address than when the variant was captured: it is captured again"
    CHANGED_NUMBER = "a number has another value than when the variant was captured"
    CHANGED_LAYOUT = "an input has another shape or dtype than when the variant was captured"
    SLOT_IN_USE = "the variant would overwrite a cached value that is kept, such as one that is verified"
    OVER_LIMIT = "captured graphs and their buffers take all the memory that caches may take"
    OBSERVED = "the session's observer or director keeps values that a replay would overwrite"
    CAPTURING = "the caller captures the call in a CUDA graph of its own"
    # always
    NO_GPU = "the model is not on an NVIDIA GPU, so there are no CUDA graphs"
    MIXED_DEVICES = "the variant has tensors on several devices, and a captured graph would not read the CPU's again"
    READS_DEVICE = "the host reads a value or a size from the device, which cannot be captured"
    STATE_IN_PLACE = "blockwise attention updates its state in place, and the state's counters are read later"
    WEIGHTS_MOVE = "the addresses of the weights change again and again"
    CAPTURE_FAILED = "the capture raised an error, see the log"


class PredictionReason(Reason):
    """Predictions: why the decisions of a policy cannot be foreseen."""

    TOTAL_UNKNOWN = "the number of steps is not known: call explain(num_steps=…)"
    NOISE_UNKNOWN = "a guard needs the noise level: set the scheduler's timesteps and call explain(scheduler=…)"
    MEASURES = "a guard or a forecast needs measurements of the run itself"
    BLOCKWISE = "the device decides during the run how many blocks of attention it computes"
