"""One small contract for each axis, and the plain data that passes between them. Nothing here imports torch."""

from loomtune.contracts.adapter import Adapter
from loomtune.contracts.batch import Batch, Drawn, Placement, Sample, Segment, Step
from loomtune.contracts.data import Data, Dropped, Piece, Row
from loomtune.contracts.evaluator import Evaluator
from loomtune.contracts.exporter import Exporter, Trained
from loomtune.contracts.guard import Guard, Judgement, Verdict
from loomtune.contracts.kernel import Kernel
from loomtune.contracts.launcher import JobSpec, JobStatus, Launcher, Resources, Submission
from loomtune.contracts.loss import DistributionLoss, Loss, Pairs
from loomtune.contracts.model import Head, Model, Tokenizer, WeightSource
from loomtune.contracts.objective import LossSums, Objective, RoleSpec, Totals
from loomtune.contracts.optimizer import Optimizer, ParameterGroup, StateKind
from loomtune.contracts.record import Record
from loomtune.contracts.reward import Answer, Reward
from loomtune.contracts.role import Reader, Role, View
from loomtune.contracts.rollout import Completion, Rollout, Sampling
from loomtune.contracts.schedule import Schedule
from loomtune.contracts.sharding import Engine, EngineSpec, ParameterShard, Sharding
from loomtune.contracts.stage import DuplicateStage, LinkStage, RowStage, SplitStage, Stage
from loomtune.contracts.tracker import Tracker

__all__ = [
    "Adapter",
    "Answer",
    "Batch",
    "Completion",
    "Data",
    "DistributionLoss",
    "Drawn",
    "Dropped",
    "DuplicateStage",
    "Engine",
    "EngineSpec",
    "Evaluator",
    "Exporter",
    "Guard",
    "Head",
    "JobSpec",
    "JobStatus",
    "Judgement",
    "Kernel",
    "Launcher",
    "LinkStage",
    "Loss",
    "LossSums",
    "Model",
    "Objective",
    "Optimizer",
    "Pairs",
    "ParameterGroup",
    "ParameterShard",
    "Piece",
    "Placement",
    "Reader",
    "Record",
    "Resources",
    "Reward",
    "Role",
    "RoleSpec",
    "Rollout",
    "Row",
    "RowStage",
    "Sample",
    "Sampling",
    "Schedule",
    "Segment",
    "Sharding",
    "SplitStage",
    "Stage",
    "StateKind",
    "Step",
    "Submission",
    "Tokenizer",
    "Totals",
    "Tracker",
    "Trained",
    "Verdict",
    "View",
    "WeightSource",
]
