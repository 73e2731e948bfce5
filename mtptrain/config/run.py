"""All settings of a run, and the rules that span several sections."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from os.path import expanduser
from typing import TYPE_CHECKING, Any

from mtptrain.config.backbone import BackboneConfig, ExportConfig, ReleaseConfig
from mtptrain.config.choices import (
    DataSource,
    Device,
    EngineName,
    ExportTarget,
    HeadExperts,
    OptimizerName,
    Precision,
)
from mtptrain.config.data import CollectConfig, DataConfig, OnPolicyConfig
from mtptrain.config.deepspeed import passed_settings
from mtptrain.config.measurement import DecodingConfig, EvaluationConfig, GenerateConfig, WatchConfig
from mtptrain.config.paths import default_output_dir, expand_home
from mtptrain.config.planning import HardwareConfig, PlanConfig
from mtptrain.config.rules import (
    ALL_CHECKPOINTS,
    HELDOUT,
    check_fields,
    checkpoint_groups,
    one_of,
    prompt_names,
    ranged,
    require,
)
from mtptrain.config.training import LossConfig, MtpConfig, StockHeadConfig, TrainConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Why stage 3 refuses bf16.
ONE_DTYPE = (
    "DeepSpeed's stage 3 holds parameters of one dtype and a head keeps some of its own in fp32; set engine=zero2 (a "
    "head is one layer: stage 3 would gather it whole for every use), perhaps with mtp.experts=expert_parallel, or "
    "precision=fp32"
)

UNCHOSEN: Any = "???"  # OmegaConf's mark of a missing value


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go: a file in the run's folder, and trackers."""

    metrics_file: bool = True  # write metrics.jsonl, the record of the run
    trackers: dict[str, bool] = field(default_factory=dict)  # by name, such as wandb: true
    project: str = "mtptrain"  # W&B: project; MLflow: experiment
    name: str | None = None  # of the run; null = chosen by the tracker
    group: str | None = None  # runs shown together; null = the name of output_dir's parent, which jobs of a sweep share
    tags: list[str] = field(default_factory=list)
    checkpoints: bool = False  # store the newest and the best checkpoint as artifacts when training ends

    @property
    def chosen(self) -> list[str]:
        """Return the names of the trackers that are switched on."""
        return [name for name, is_on in self.trackers.items() if is_on]


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run: a task, its parts and its folder."""

    task: str = UNCHOSEN  # a module of mtptrain/recipes; +recipe=NAME sets it
    output_dir: str | None = None  # null = outputs/<task>/<date-time>
    # auto: continue the run in output_dir from its newest whole checkpoint; in a sweep, every job of it.
    resume: str = one_of("never", "never", "auto")
    resume_allow: list[str] = field(default_factory=list)  # settings or sections that may differ from the resumed run
    overwrite: bool = False  # replace a result in output_dir, such as evaluation.json, doctor.json or report.html
    seed: int = ranged(0, at_least=0)
    device: Device = Device.auto
    precision: Precision = Precision.auto
    engine: EngineName = EngineName.single
    offload: bool = False  # engine=zero1-3: keep the optimiser's state in the CPU's memory
    # engine=zero1-3: DeepSpeed's settings, such as {config: FILE, zero_optimization: {reduce_bucket_size: 1e8}}
    deepspeed: dict[str, Any] = field(default_factory=dict)
    # CPU threads of torch; null = 1 for a backbone with a hidden_size below 256, else half the cores.
    threads: int | None = ranged(None, at_least=1)
    # Minutes that a process waits for another, e.g. while rank 0 reads, tokenises or writes; then the run ends.
    distributed_timeout: int = ranged(60, at_least=1)
    # evaluate, doctor, export, generate, measure_server: a checkpoint's, a run's or an export's folder, or `stock`, or
    # hf://ORGANISATION/NAME.
    checkpoint: str | None = None
    # compare: two or more of these, the first is the baseline; the seeds of one setting are a list: [[A0,A1],[B0,B1]].
    # evaluate: `all` measures every checkpoint of the run in `checkpoint`.
    checkpoints: Any = field(default_factory=list)
    url: str | None = None  # measure_server: address of a running vLLM or SGLang server
    path: str | None = None  # report: the folder of a run, comparison or sweep, or the JSON file in it
    prompt: str | None = None  # generate: text to continue; null = each line of standard input
    target: ExportTarget | None = None  # export: loader of the folder: vllm, sglang, llama_cpp or hf
    # `heldout`, or one or a list of files (.jsonl, .json, .csv, .parquet), folders, `datasets` as NAME or
    # NAME:SUBSET:SPLIT, and benchmarks: gsm8k, math500, mbpp, humaneval, mt_bench.
    prompts: Any = HELDOUT
    evaluate_at_end: bool = True  # pretrain and distill: measure the trained head
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stock_head: StockHeadConfig = field(default_factory=StockHeadConfig)  # recipe=backbone: training of its stock head
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    release: ReleaseConfig = field(default_factory=ReleaseConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    model: BackboneConfig | None = None  # plan: shapes of the model
    hardware: HardwareConfig | None = None  # plan: hardware of the model
    plan: PlanConfig | None = None

    def __post_init__(self) -> None:
        expand_home(self)
        check_fields(self, "")
        depth, length = self.mtp.num_steps, self.data.sequence_length
        require(
            length >= depth + 2,
            "data.sequence_length",
            length,
            f"leaves no target at depth {depth}: step k needs token i+k+1; use at least {depth + 2}",
        )
        if self.task != "plan":  # a plan reads no data
            self.data.require_path()
        self._check_engine()
        checkpoint_groups(self.checkpoints)
        self._check_prompts()
        self._check_streams()
        self._check_on_policy()
        require(
            self.resume == "never" or self.output_dir is not None,
            "resume",
            self.resume,
            "needs the folder of the run to continue; set output_dir",
        )
        require(
            self.resume == "auto" or not self.resume_allow,
            "resume_allow",
            self.resume_allow,
            "names settings that may differ from the run to continue; add resume=auto",
        )

    @property
    def measures_all(self) -> bool:
        """Whether every checkpoint of a run is to be measured."""
        return bool(self.checkpoints == ALL_CHECKPOINTS)

    @property
    def compared(self) -> list[list[str]]:
        """The heads to compare: for each setting, the checkpoints of its seeds."""
        return checkpoint_groups(self.checkpoints)

    def _check_prompts(self) -> None:
        """Convert `prompts` to a list of names, and refuse it together with `evaluation.traces`."""
        names = self.prompts = prompt_names("prompts", self.prompts, HELDOUT)
        require(
            names == [HELDOUT] or self.evaluation.traces is None,
            "prompts",
            names,
            "evaluation.traces brings its own prompts; leave one of them out",
        )

    def _check_streams(self) -> None:
        """Check the rule of training from cached streams."""
        from_streams = self.data.source is DataSource.streams
        require(
            not from_streams or self.mtp.init != "backbone",
            "mtp.init",
            "backbone",
            "copies a layer of the backbone, and data=streams loads none; use mtp.init=stock or fresh",
        )

    def _check_on_policy(self) -> None:
        """Check the rules of training on the backbone's own texts."""
        if self.data.source is not DataSource.on_policy:
            return
        measured = sorted(set(self.on_policy.prompts).intersection(self.prompts))
        require(not measured, "on_policy.prompts", measured, "are used to measure heads; name other prompts")

    def _check_engine(self) -> None:
        """Check the rules between engine, precision, optimiser and offloading."""
        is_single = self.engine is EngineName.single
        require(not (is_single and self.offload), "offload", True, "needs engine=zero1, zero2 or zero3")
        rule = "tunes DeepSpeed; set engine=zero1, zero2 or zero3"
        require(not (is_single and self.deepspeed), "deepspeed", sorted(self.deepspeed), rule)
        self.deepspeed = passed_settings(self.deepspeed, self.engine, self.offload)
        rule = f"needs whole matrices and engine={self.engine.value} cuts them; set engine=single, or leave it out"
        is_possible = is_single or self.train.optimizer is OptimizerName.adamw
        require(is_possible, "train.optimizer", self.train.optimizer.value, rule)
        require(
            not (self.engine is EngineName.zero3 and self.mtp.quant_aware),
            "mtp.quant_aware",
            True,
            "rounds whole weights and engine=zero3 cuts them; set engine=zero2",
        )
        require(
            not (self.engine is EngineName.zero3 and self.mtp.experts is HeadExperts.expert_parallel),
            "mtp.experts",
            "expert_parallel",
            "leaves whole experts on each process and engine=zero3 cuts every tensor; set engine=zero1 or zero2",
        )
        require(
            not (self.train.recompute and self.mtp.quant_aware),
            "mtp.quant_aware",
            True,
            "holds rounded weights during the forward only, and train.recompute runs it again later; set one of them",
        )
        require(
            not (self.engine is EngineName.zero3 and self.precision is Precision.bf16),
            "precision",
            "bf16",
            ONE_DTYPE,
        )


@cache
def run_schema() -> DictConfig:
    """Return the schema of `RunConfig`, the same object at every call: do not change it."""
    # Programs without this command line, such as most benchmarks in scripts/, need no Hydra.
    from omegaconf import OmegaConf

    return OmegaConf.structured(RunConfig)


@cache
def _store_schema() -> None:
    """Give Hydra the schema, with the sections whose keys are the user's left open."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    schema = deepcopy(run_schema())
    for section in (schema.data.chat_template_kwargs, schema.deepspeed, schema.tracking.trackers):
        OmegaConf.set_struct(section, False)
    ConfigStore.instance().store(name="run_schema", node=schema)


def register() -> None:
    """Register `RunConfig` as Hydra's schema, and the resolvers of the values in conf/ that depend on others."""
    from omegaconf import OmegaConf

    _store_schema()
    # Hydra writes multirun.yaml there, and every job has its folder below it.
    new = default_output_dir("sweep")
    OmegaConf.register_new_resolver("sweep_folder", lambda path: expanduser(path or str(new)), replace=True)
    OmegaConf.register_new_resolver("optimizer_for", optimizer_for, replace=True)
    OmegaConf.register_new_resolver("at_least", max, replace=True)


def optimizer_for(engine: EngineName) -> str:
    """Return the better optimiser that an engine can run: Muon needs whole matrices, which ZeRO cuts."""
    return OptimizerName.muon.value if engine is EngineName.single else OptimizerName.adamw.value
