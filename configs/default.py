"""All options of a run, each in one line: its kind, its default, its unit and its reason.

The defaults are the published recipe (arXiv 2505.13447; DiT-B/4 on ImageNet latents). A YAML file
in this folder states what differs, and the command line has the last word; `load_config.py` merges
the three and refuses whatever is not named here. A new option is one line, and read somewhere.

The kind says which values are meant: Count (1 or more), Whole (0 or more), Share (0 to 1), others
in kinds.py. Around it stands what else is known: an option that is Free may change within a run,
all others make the run; a Place is where something lies on this machine; a Preference comes with
the weights that are sampled from, unless the command line says otherwise.
"""

from typing import Literal

from configs import option

from configs.kinds import (  # isort: skip
    Classes, Count, Decay, Decays, Floats, Free, Halves, Ints, NotNegative, Path, Place, Positive,
    Preference, Records, Samples, Seed, Share, Size, SizeOrNone, SomeSteps, Span, Steps, Texts,
    Times, Whole,
)  # fmt: skip


class Dataset:
    """The data."""

    name: Place[str] = "imgnet_latent"  # folder below $DATA_ROOT that is read when root is empty
    root: Records = ""  # folder of the records; empty: $DATA_ROOT/name
    stage: Free[Path] = "cache"  # copy of a root in gs://: cache | shm | a folder | none (no copy)
    image_size: Size = 32  # side of what the network sees (latents, pixels), or height,width
    image_channels: Count = 4  # its channels: 4 for latents, 3 or 1 for pixels
    num_classes: Classes = 1000  # labels 0..num_classes-1, 0: unconditional, -1: as the records
    vae: Place[Path] = "mse"  # mse | ema | a folder in the Hugging Face layout | none (pixels)
    float_values: bool = False  # vae none: records hold numbers of any range, not bytes
    value_range: Floats = ()  # (low, high) that drawn values are clipped to; empty: they are not
    latent_mean: Floats = ()  # per-channel mean of latents, values; empty: times 0.18215, as is
    latent_std: Floats = ()  # per-channel standard deviation, together with latent_mean
    use_flip: bool = False  # mirror half of the images (latents: needs moments_flipped records)
    conditions: Texts = ()  # names of what records hold beside, given to the network (low, text)
    condition_shapes: Texts = ()  # dtype and shape of each, as uint8:8x8x1; empty: as the records
    kept_conditions: Texts = ()  # those that stay where the label is dropped for guidance
    condition_root: Place[Path] = ""  # records whose conditions images are drawn by; empty: root
    condition_split: Free[str] = "train"  # their split
    augment_prob: Share = 0.0  # pixels: of each scale, stretch, shift; told to the UNet; 0: none
    num_workers: Free[Whole] = 4  # threads of each process that read records
    prefetch_factor: Free[Count] = 2  # batches that are read ahead


class Model:
    """The network."""

    cls: str = "DiT_B_4"  # DiT_B_4, imfDiT_B_2, pmfDiT_B_16, ...; DiT, imfDiT, pmfDiT, UNet: below
    depth: Whole = 0  # number of blocks; 0: that of cls
    hidden_size: Whole = 0  # width; 0: that of cls
    num_heads: Whole = 0  # attention heads; 0: that of cls
    patch_size: SizeOrNone = 0  # side of a patch, or height,width; 0: that of cls
    aux_head_depth: Whole = 0  # imfDiT: blocks of each head (depth counts one); 0: that of cls
    time_cond: str = "t,h"  # what is embedded: "t,r", "t,h", "t,r,h" or "h", with h = t - r
    unroll: Free[Whole] = 0  # blocks per iteration of the loop over them; 0: the best for the card
    remat: Free[bool] = False  # recompute each block backward: less memory, a third more time
    fused_attention: Free[bool | None] = None  # kernels of NVIDIA cards; null: there
    half_residual: Free[bool | None] = None  # between blocks too; null: half_precision
    model_channels: Count = 128  # UNet, also all below: the unit of its widths
    channel_mult: Ints = (2, 2, 2)  # width of each level; a level has half the side of the last
    channel_mult_emb: Count = 4  # width of the embedding
    channel_mult_noise: Count = 2  # width of the embedding of one time
    num_blocks: Count = 4  # of each level of the encoder; the decoder has one more
    attn_resolutions: Ints = (16,)  # sides (the longer ones) at which there is attention
    dropout: Share = 0.2  # probability that an activation is left out in training
    resample_filter: Floats = (1.0, 3.0, 3.0, 1.0)  # between two levels
    augment_dim: Whole = 6  # numbers that tell the network of the augmentation; 0: it is not told


class Method:
    """The objective."""

    name: str = "meanflow"  # meanflow | improved | flow | soflow | ... (docs/objectives.md)
    noise_dist: str = "logit_normal"  # distribution of t and r: logit_normal | uniform
    P_mean: float = -0.4  # logit-normal: mean of logit(t)
    P_std: float = 1.0  # logit-normal: standard deviation of logit(t)
    P_mean_r: float | None = None  # the same for the second draw; null: P_mean
    P_std_r: float | None = None  # null: P_std
    P_mean_equal: float | None = None  # the same where r = t; null: P_mean
    P_std_equal: float | None = None  # null: P_std
    tr_sampler: str = "v0"  # v0: the later draw is t, the other r | v1: r is at most t, else t
    data_proportion: float = 0.75  # share of the rows with r = t (plain flow matching)
    equal_rows: str = "fixed"  # their number: fixed (no JVP for them) | drawn row by row
    class_dropout_prob: float = 0.1  # probability that a row trains without its label
    guidance_eq: str = "cfg"  # target velocity: cfg (guided) | mix (guided, as SoFlow) | none
    omega: float = 1.0  # guidance scale; the effective one is omega / (1 - kappa)
    kappa: float = 0.5  # share of the conditional prediction in the target (paper, appendix B.1)
    t_start: float = 0.0  # guidance holds for t_start <= t <= t_end, row by row
    t_end: float = 1.0  # the end of that interval
    mix: float = 0.25  # mix: share of v (1 + f (omega - 1)) - ...; the rest is v_c
    fade_start: float = 0.8  # mix: its fade f is 1 up to this t and falls to 0 at t = 1; 1: no fade
    tangent: Floats = (0.0, 1.0)  # (dr, dt) of the JVP, dz = v; the others of Table 1b are wrong
    cfg_beta: float = 1.0  # improved: guidance scales are drawn with a density like omega^-cfg_beta
    omega_max: float = 8.0  # improved: the largest guidance scale that is drawn; the smallest is 1
    norm_p: float = 1.0  # adaptive weight 1 / (error + norm_eps) ** norm_p; 0: plain squared error
    norm_eps: float = 0.01  # keeps the adaptive weight finite
    norm_eps_per_pixel: float = 0.0  # above 0: norm_eps is this, times h w c of what is trained on
    target_clip: float = 4.0  # largest absolute value in the target, where r < t; 0: not clipped
    alpha_schedule: str = "exponential"  # constant (alpha_last) | linear | cosine | exponential
    alpha_first: float = 0.1  # share of an interval [r, t] that is split off, at the beginning
    alpha_last: float = 0.002  # and at the end
    alpha_begin: int = 0  # step after which alpha changes
    alpha_end: int = 0  # step at which it has changed; 0: the end of the run
    alpha_floor: bool = False  # alphaflow: end at 0.005 instead of MeanFlow, never with a JVP
    difference_step: float = 0.005  # half the distance in t of the central difference
    difference_path: str = "data"  # of the central difference: data (along v) | guided (v_g)
    grid_steps: int = 128  # shortcut: steps of the grid, a power of two
    target_params: str = "params"  # lagrangian: whose velocity is the target: params | ema
    noise_scale: float = 1.0  # pixel: standard deviation of the noise, in sampling too
    tr_uniform: bool = False  # pixel: a tenth of the rows has uniform times
    lpips_weight: float = 0.0  # pixel: of the distance by LPIPS; 0: its network is not loaded
    convnext_weight: float = 0.0  # pixel: of the distance by ConvNeXt-V2; 0: it is not loaded
    perceptual_max_t: float = 1.0  # pixel: both count where t is below


class Training:
    """Training."""

    seed: Seed = 42  # of the initial weights, the data order and every draw
    batch_size: Free[Count] = 256  # images per step, over all devices of all hosts
    num_epochs: Free[Whole] = 240  # an epoch is num_records // batch_size steps
    num_steps: Free[Whole] = 0  # length of the run in steps; 0: num_epochs decides
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices, and NAdam for the rest
    learning_rate: Positive = 1e-4  # after the warm-up
    lr_schedule: Literal["const", "cosine"] = "const"  # cosine: to zero at the end of the run
    warmup_steps: Whole = 0  # steps of linear warm-up
    warmup_epochs: Whole = 0  # the same in epochs, instead of warmup_steps
    warmup_init: NotNegative = 0.0  # learning rate at its beginning
    adam_b1: Decay = 0.9  # decay of the mean of the gradient
    adam_b2: Decay = 0.95  # decay of the mean of its square
    weight_decay: NotNegative = 0.0  # decoupled (AdamW), on every parameter
    grad_clip: NotNegative = 0.0  # largest global norm of the gradient; 0: no clipping (published)
    grad_accum_steps: Free[Count] = 1  # parts in which the batch is computed, one after the other
    skip_nonfinite: Free[bool] = False  # leave out updates that are not finite instead of stopping
    ema_val: Preference[Decays] = (0.9999,)  # decays of the averages; the first is evaluated
    ema_period: Count = 1  # updates between two changes of the averages, by decay ** period
    ema_half_life: Preference[Halves] = ()  # averages by half-life, in thousands of images
    ema_sigma: Floats = ()  # sigma_rel of power-function averages, as 0.05,0.10 (post-hoc EMA)
    ema_snapshot_per_epoch: Free[Count] = 5  # epochs between two snapshots of those, all kept
    half_precision: Preference[bool] = False  # matrix products of the network in bfloat16
    log_per_step: Free[Count] = 100  # steps between two lines of metrics
    sample_on_training: Free[bool] = True  # draw a grid of samples during training
    sample_per_epoch: Free[Whole] = 10  # epochs between two grids
    sample_steps: Free[Steps] = (1, 2, 4)  # a row of one noise for each beside the grid; or none
    checkpoint_per_epoch: Free[Count] = 10  # epochs between two checkpoints; the newest 3 are kept
    fid_per_epoch: Free[Whole] = 10  # epochs between two evaluations
    sample_per_step: Free[Whole] = 0  # steps between two grids; 0: sample_per_epoch decides
    checkpoint_per_step: Free[Whole] = 0  # steps between two checkpoints; 0: checkpoint_per_epoch
    fid_per_step: Free[Whole] = 0  # steps between two evaluations; 0: fid_per_epoch decides
    keep_best: Free[str] = ""  # metric (fid, ...) whose best checkpoint stays in WORKDIR/best
    wandb: Free[str] = ""  # project of Weights & Biases (needs pip install wandb); empty: not used
    profile_steps: Free[Span] = ()  # (first, last) step of a profile, first > 1; empty: none


class Sampling:
    """Sampling."""

    seed: Seed = 0  # of noise and labels; image i depends on it and i alone, but for rounding
    num_steps: SomeSteps = (1,)  # network evaluations per image; several: evaluate each
    method: Texts = ("ode",)  # ode | consistency (average velocity) | euler | heun; several: each
    omega: Preference[Floats] = ()  # guidance scales, if guided in sampling; several: each
    t_min: Preference[Times] = (0.0,)  # guidance holds for t_min <= t <= t_max; several: each
    t_max: Preference[Times] = (1.0,)  # the end of that interval; several: each
    channels: Preference[Whole] = 0  # first channels that guidance concerns; 0: all
    sampling_timesteps: Floats = ()  # explicit times 1 > ... > 0, instead of num_steps equal steps
    num_images: Count = 64  # of a sampling job
    labels: Ints = ()  # classes of a sampling job, repeated in turn; empty: all classes
    conditions: Path = ""  # .npz or folder of .npy with a row for each image; empty: of records
    format: Literal["png", "npz"] = "png"  # what a sampling job writes beside its grid
    vae_dtype: Literal["float32", "bfloat16"] = "float32"  # of the decoder's products


class Fid:
    """Evaluation."""

    on_training: bool = True  # evaluate during training
    num_samples: Samples = 50000  # generated images
    device_batch_size: Count = 20  # images per device at a time
    cache_ref: Path = ""  # npz with the reference mean and covariance; empty: the training images
    evaluator: str = "meanflow"  # meanflow | adm | edm2: whose numbers; it sets what is empty below
    resize: str = ""  # to 299x299: half_pixel (published numbers) | tf1 (ADM, NVIDIA)
    labels: str = ""  # labels of the samples: random (all three) | balanced | data (as the records)
    rounding: str = ""  # of images to bytes: nearest (127.5 x + 128) | down (127.5 (x + 1), ADM)
    metrics: Texts = ()  # fid, sfid, inception_score, precision_recall, fd_dinov2, kid, ...
    features: str = "inception"  # inception (FID) | pixels | values: Frechet distance of these
    inception_weights: Path = ""  # weight file; empty: $INCEPTION_WEIGHTS, then the cache folder
    dinov2_weights: Path = ""  # weight file; empty: $DINOV2_WEIGHTS, then the cache folder
    dinov2_resize: str = "edm2"  # to 224x224: edm2 | edm2_pil (dgm-eval) | torch_fidelity
    weights: Texts = ("ema",)  # which weights: ema, ema_DECAY, ema_sigmaS (any profile), params


class Mesh:
    """Devices."""

    fsdp: Whole = 0  # devices over which weights, averages and optimizer are split; 0: as is best


class Config:
    """The job."""

    dataset: Dataset
    model: Model
    method: Method
    training: Training
    sampling: Free[Sampling]
    fid: Free[Fid]
    mesh: Free[Mesh]
    load_from: Free[Path | None] = None  # a run's workdir or a published checkpoint
    init_from: Free[Path | None] = None  # weights to begin a new run with, or a .pt
    init_weights: Free[Literal["ema", "params"]] = "ema"  # which of them
    init_format: Free[str] = ""  # of a .pt file, which does not say it: sit | repa | dit
    eval_only: Free[bool] = False  # evaluate load_from, else the run's checkpoint, and stop
    sample_only: Free[bool] = False  # draw sampling.num_images likewise, and stop


OPTIONS = option.read(Config)  # {"section.option": option.Option}


def get_config():
    """Returns the default `ConfigDict`. A fresh one at each call."""
    return option.config(OPTIONS)
