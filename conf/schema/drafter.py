"""Training of a draft adapter: everything `python -m lora.train` composes."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

from conf.schema.optimization import Dtype, OptimizerConfig, ScheduleConfig
from conf.schema.run import Device, ResumeMode


class DraftLoss(Enum):
    """Loss of one drafted position; q is the drafter's distribution there, p the verifier's (frozen, causal).

    argmax: cross entropy to the token the verifier would choose. data: cross entropy to the token that stands there.
    kl: KL(p || q). tv: total variation, 1 - sum min(p, q). hybrid: lambda KL + (1 - lambda) TV with
    lambda = exp(-hybrid_rate * acceptance) (arXiv 2602.23881). expected_length: minus the expected number of accepted
    tokens of the block, the sum of cumulative products of acceptances; it has its own position weights.
    verified: of the technical report (section 3.3). A draft is drawn and verified, and up to its first rejection a
    matching term and a cross entropy count; see VerifiedDraftConfig.
    """

    argmax = "argmax"
    data = "data"
    kl = "kl"
    tv = "tv"
    hybrid = "hybrid"
    expected_length = "expected_length"
    verified = "verified"


class PositionWeights(Enum):
    """none: every drafted position counts alike. reach: by the chance that all earlier ones are accepted."""

    none = "none"
    reach = "reach"


class VerifiedPositions(Enum):
    """Positions of a verified draft that count. active: the accepted and the first rejected one. all: every one."""

    active = "active"
    all = "all"


class ResponseSource(Enum):
    """Text that is drafted. given: that of the data. greedy, sampled: the model's own responses (on-policy).

    The model responds to one prompt per record of .jsonl files: {"prompt": text}, {"messages": [...]} before any
    response at the end, or the beginning of {"text": text}. Of other data the prompts are the beginning of each text,
    and of each chat everything before its last response.
    """

    given = "given"
    greedy = "greedy"
    sampled = "sampled"


@dataclass
class AdapterConfig:
    """LoRA on every o_proj. rank: r of the update B A. alpha: the update is scaled by alpha / rank."""

    rank: int = 128
    alpha: float = 512.0


@dataclass
class VerifiedDraftConfig:
    """Numbers of the loss `verified`; the defaults are those of the technical report.

    A block costs the mean over its positions of matching_weight * (w KL(p || q) + (1 - w) TV) plus argmax_weight * the
    cross entropy to the verifier's choice, with w = exp(-matching_rate * acceptance).
    sampled_share: share of the blocks whose draft is sampled; the others draft greedily.
    draft_temperature: of sampled drafts.
    positions: see VerifiedPositions.
    matching_weight, matching_temperature, matching_rate: of the matching term; its temperature is that of both p and q.
    argmax_weight, argmax_temperature: of the cross entropy; its temperature is the drafter's.
    support: likeliest tokens of each model, to whose union all distributions are restricted; null: all tokens.
    """

    sampled_share: float = 0.9
    draft_temperature: float = 1.0
    positions: VerifiedPositions = VerifiedPositions.active
    matching_weight: float = 1.0
    matching_temperature: float = 3.0
    matching_rate: float = 0.5
    argmax_weight: float = 1.0
    argmax_temperature: float = 1.0
    support: Optional[int] = 200


@dataclass
class DraftObjectiveConfig:
    """Objective of the draft adapter.

    loss, position_weights: see DraftLoss and PositionWeights; the latter does not apply to expected_length and to
    verified.
    hybrid_rate: of hybrid. reach_floor: of reach; an acceptance counts at least this much, so that late positions learn
    from the beginning. verified: of the loss of this name.
    """

    loss: DraftLoss = DraftLoss.argmax
    position_weights: PositionWeights = PositionWeights.reach
    hybrid_rate: float = 3.0
    reach_floor: float = 0.3
    verified: VerifiedDraftConfig = field(default_factory=VerifiedDraftConfig)


@dataclass
class ResponsesConfig:
    """Where drafted text comes from.

    source: see ResponseSource. prompts: most prompts that get a response, a random choice. temperature: of sampled.
    max_new_tokens: of one response. prompt_tokens: tokens of a text that make its prompt; chats have their own prompts.
    prompts_per_shard: prompts that get a response between two writes to the cache. batch_size: prompts of equal length
    decoded together. cache: folder of responses, shared by runs; null is answers/ in the run folder.
    """

    source: ResponseSource = ResponseSource.given
    prompts: int = 16384
    temperature: float = 1.0
    max_new_tokens: int = 256
    prompt_tokens: int = 64
    prompts_per_shard: int = 256
    batch_size: int = 32
    cache: Optional[str] = None


@dataclass
class ZeroConfig:
    """DeepSpeed ZeRO. stage: 0 replicates, 1 shards optimizer state, 2 gradients too, 3 weights too.

    offload_optimizer, offload_parameters: keep these in the CPU's memory (the latter with stage 3 alone).
    """

    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass
class DrafterTrainConfig:
    """Length and batch.

    steps: optimizer steps. global_batch_size: sequences per step. micro_batch_size: sequences per forward of a rank.
    sequence_length: tokens; longer documents are cut. blocks_per_sequence: drafted blocks per sequence and step, at
    random anchors. seed: of the adapter, the order of the data and the anchors.
    """

    steps: int = 2000
    global_batch_size: int = 64
    micro_batch_size: int = 1
    sequence_length: int = 4096
    blocks_per_sequence: int = 64
    seed: int = 1234


@dataclass
class DrafterEvaluationConfig:
    """Held-out acceptance while training, always on the same blocks.

    every_steps: steps between evaluations; there is always one before the first step and one at the end.
    sequences: held-out sequences used. share: of the documents of `data` that are held out where `heldout` is null.
    """

    every_steps: int = 200
    sequences: int = 64
    share: float = 0.02


@dataclass
class DrafterCheckpointConfig:
    """Checkpoints of a run.

    every_steps: steps between checkpoints; 0 saves at the end only. keep: newest complete ones that stay.
    """

    every_steps: int = 200
    keep: int = 2


@dataclass
class DrafterRuntimeConfig:
    """Settings of a process; none changes the result beyond rounding.

    device: see Device. dtype: of the frozen model; the adapter is fp32. gradient_checkpointing: recompute the drafted
    blocks' layers. loss_chunk_blocks: drafted blocks whose logits are in memory at a time.
    log_every_steps: steps between console lines (every step is in metrics.jsonl). progress_bar: show one on
    rank 0's terminal. tensorboard: write event files. timeout_minutes: of collectives.
    """

    device: Device = Device.auto
    dtype: Dtype = Dtype.bf16
    gradient_checkpointing: bool = False
    loss_chunk_blocks: int = 16
    log_every_steps: int = 10
    progress_bar: bool = True
    tensorboard: bool = True
    timeout_minutes: float = 30.0


@dataclass
class DrafterRunConfig:
    """Where the run lives.

    `dir` holds config.yaml, metrics.jsonl, tensorboard/, data/, answers/ (responses) and checkpoints/.
    root, name: parent folder and name. dir: the folder itself, root/name unless given.
    """

    root: str = "runs"
    name: str = "drafter"
    dir: str = "${run.root}/${run.name}"


@dataclass
class DrafterConfig:
    """One training of a draft adapter.

    checkpoint: directory in the exported format, ours or a released one. data, heldout: chats or texts (.jsonl,
    .parquet, a folder of them), prompts (.jsonl) that the model responds to if responses.source says so, or a folder of
    tokens that `make prepare-data` wrote; heldout null takes a share of data. chat_template: of chats that are not
    tokenised yet; null is the checkpoint's own, chatml the model family's, else the path of a jinja file.
    output: folder of the adapter; null is linear_spec_lora/ in the checkpoint.
    block_size: tokens of a drafted block, its seed included; null is the checkpoint's. resume: see ResumeMode.
    optimizer, schedule: groups of conf/drafter/ give their values.
    experiment: name of the composed experiment, for the record.
    """

    checkpoint: str = MISSING
    data: str = MISSING
    heldout: Optional[str] = None
    chat_template: Optional[str] = None
    output: Optional[str] = None
    block_size: Optional[int] = None
    resume: ResumeMode = ResumeMode.auto
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    objective: DraftObjectiveConfig = field(default_factory=DraftObjectiveConfig)
    responses: ResponsesConfig = field(default_factory=ResponsesConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    train: DrafterTrainConfig = field(default_factory=DrafterTrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: DrafterEvaluationConfig = field(default_factory=DrafterEvaluationConfig)
    checkpointing: DrafterCheckpointConfig = field(default_factory=DrafterCheckpointConfig)
    runtime: DrafterRuntimeConfig = field(default_factory=DrafterRuntimeConfig)
    run: DrafterRunConfig = field(default_factory=DrafterRunConfig)
    experiment: Any = None
