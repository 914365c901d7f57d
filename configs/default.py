"""The schema of a run: every option, its default, its unit and its reason.

The defaults are the published recipe (arXiv 2505.13447; DiT-B/4 on ImageNet latents). A YAML file
in this folder states what differs, and the command line has the last word; `load_config.py` merges
the three and refuses whatever is not named here.
"""

import ml_collections
from ml_collections import config_dict


def get_config():
    """Returns the default `ConfigDict`. A fresh one at each call."""
    config = ml_collections.ConfigDict()
    sections = {
        "dataset": _dataset,
        "model": _model,
        "method": _method,
        "training": _training,
        "sampling": _sampling,
        "fid": _fid,
        "mesh": _mesh,
    }
    for name, fill in sections.items():
        config[name] = ml_collections.ConfigDict()
        fill(config[name])
    _job(config)
    return config


# The data -------------------------------------------------------------------------------------


def _dataset(dataset):
    dataset.name = "imgnet_latent"  # folder below $DATA_ROOT that is read when root is empty
    dataset.root = ""  # record folder; $VARIABLES and ~ are expanded; empty: $DATA_ROOT/name
    dataset.image_size = 32  # height and width of what the network sees (latent or pixels)
    dataset.image_channels = 4  # its channels: 4 for latents, 3 or 1 for pixels
    dataset.num_classes = 1000  # labels 0..num_classes-1, 0: unconditional, -1: as the records
    dataset.vae = "mse"  # mse | ema | a folder in the Hugging Face layout | none (pixels)
    dataset.latent_mean = ()  # per-channel mean of the latents; empty: scale by 0.18215 instead
    dataset.latent_std = ()  # per-channel standard deviation, together with latent_mean
    dataset.use_flip = False  # mirror half of the images (latents: needs moments_flipped records)
    dataset.augment_prob = 0.0  # pixels: of each scale, stretch, shift; told to the UNet; 0: none
    dataset.num_workers = 4  # threads of each process that read records
    dataset.prefetch_factor = 2  # batches that are read ahead


# The network ----------------------------------------------------------------------------------


def _model(model):
    model.cls = "DiT_B_4"  # DiT_{S,B,M,L,XL}_{2,4,8}, imfDiT_{B,M,L,XL}_2; DiT, imfDiT, UNet: below
    model.depth = 0  # number of blocks; 0: that of cls
    model.hidden_size = 0  # width; 0: that of cls
    model.num_heads = 0  # attention heads; 0: that of cls
    model.patch_size = 0  # side of a patch; 0: that of cls
    model.aux_head_depth = 0  # imfDiT: blocks of each head (depth counts one head); 0: that of cls
    model.time_cond = "t,h"  # what is embedded: "t,r", "t,h", "t,r,h" or "h", with h = t - r
    model.unroll = 0  # blocks per iteration of the loop over them; 0: as is best for the card
    model.remat = False  # recompute each block in the backward pass: less memory, a third more time
    model.fused_attention = config_dict.placeholder(bool)  # kernels of NVIDIA cards; null: there
    model.half_residual = config_dict.placeholder(bool)  # between blocks too; null: half_precision
    model.model_channels = 128  # UNet, also all below: the unit of its widths
    model.channel_mult = (2, 2, 2)  # width of each level; a level has half the side of the last
    model.channel_mult_emb = 4  # width of the embedding
    model.channel_mult_noise = 2  # width of the embedding of one time
    model.num_blocks = 4  # of each level of the encoder; the decoder has one more
    model.attn_resolutions = (16,)  # sides at which there is attention
    model.dropout = 0.2  # probability that an activation is left out in training
    model.resample_filter = (1.0, 3.0, 3.0, 1.0)  # between two levels
    model.augment_dim = 6  # numbers that tell the network of the augmentation; 0: it is not told


# The objective --------------------------------------------------------------------------------


def _method(method):
    method.name = "meanflow"  # meanflow | improved | flow | soflow | ... (docs/objectives.md)
    method.noise_dist = "logit_normal"  # distribution of t and r: logit_normal | uniform
    method.P_mean = -0.4  # logit-normal: mean of logit(t)
    method.P_std = 1.0  # logit-normal: standard deviation of logit(t)
    method.P_mean_r = config_dict.placeholder(float)  # the same for the second draw; null: P_mean
    method.P_std_r = config_dict.placeholder(float)  # null: P_std
    method.P_mean_equal = config_dict.placeholder(float)  # the same where r = t; null: P_mean
    method.P_std_equal = config_dict.placeholder(float)  # null: P_std
    method.tr_sampler = "v0"  # v0: the later draw is t, the other r | v1: r is at most t, else t
    method.data_proportion = 0.75  # share of the rows with r = t (plain flow matching)
    method.equal_rows = "fixed"  # their number: fixed (no JVP for them) | drawn row by row
    method.class_dropout_prob = 0.1  # probability that a row trains without its label
    method.guidance_eq = "cfg"  # target velocity: cfg (guided) | mix (guided, as SoFlow) | none
    method.omega = 1.0  # guidance scale; the effective one is omega / (1 - kappa)
    method.kappa = 0.5  # share of the conditional prediction in the target (paper, appendix B.1)
    method.t_start = 0.0  # guidance holds for t_start <= t <= t_end, row by row
    method.t_end = 1.0  # the end of that interval
    method.mix = 0.25  # mix: share of v (1 + f (omega - 1)) - ...; the rest is v_c
    method.fade_start = 0.8  # mix: its fade f is 1 up to this t and falls to 0 at t = 1; 1: no fade
    method.tangent = (0.0, 1.0)  # (dr, dt) of the JVP, dz = v; the others of Table 1b are wrong
    method.cfg_beta = 1.0  # improved: guidance scales are drawn with a density like omega^-cfg_beta
    method.omega_max = 8.0  # improved: the largest guidance scale that is drawn; the smallest is 1
    method.norm_p = 1.0  # adaptive weight 1 / (error + norm_eps) ** norm_p; 0: plain squared error
    method.norm_eps = 0.01  # keeps the adaptive weight finite
    method.norm_eps_per_pixel = 0.0  # above 0: norm_eps is this, times h w c of what is trained on
    method.target_clip = 4.0  # largest absolute value in the target, where r < t; 0: not clipped
    method.alpha_schedule = "exponential"  # constant (alpha_last) | linear | cosine | exponential
    method.alpha_first = 0.1  # share of an interval [r, t] that is split off, at the beginning
    method.alpha_last = 0.002  # and at the end
    method.alpha_begin = 0  # step after which alpha changes
    method.alpha_end = 0  # step at which it has changed; 0: the end of the run
    method.alpha_floor = False  # alphaflow: end at 0.005 instead of MeanFlow, never with a JVP
    method.difference_step = 0.005  # half the distance in t of the central difference
    method.difference_path = "data"  # of the central difference: data (along v) | guided (v_g)
    method.grid_steps = 128  # shortcut: steps of the grid, a power of two


# Training -------------------------------------------------------------------------------------


def _training(training):
    training.seed = 42  # of the initial weights, the data order and every draw
    training.batch_size = 256  # images per step, over all devices of all hosts
    training.num_epochs = 240  # an epoch is num_records // batch_size steps
    training.num_steps = 0  # length of the run in steps; 0: num_epochs decides
    training.learning_rate = 1e-4  # of AdamW, after the warm-up
    training.lr_schedule = "const"  # const | cosine (to zero at the end of the run)
    training.warmup_steps = 0  # steps of linear warm-up
    training.warmup_epochs = 0  # the same in epochs, instead of warmup_steps
    training.warmup_init = 0.0  # learning rate at its beginning
    training.adam_b1 = 0.9  # decay of the mean of the gradient
    training.adam_b2 = 0.95  # decay of the mean of its square
    training.weight_decay = 0.0  # decoupled (AdamW), on every parameter
    training.grad_clip = 0.0  # largest global norm of the gradient; 0: no clipping (published)
    training.grad_accum_steps = 1  # parts in which the batch is computed, one after the other
    training.skip_nonfinite = False  # leave out updates that are not finite instead of stopping
    training.ema_val = (0.9999,)  # decays of the averages of the weights; the first is evaluated
    training.ema_period = 1  # updates between two changes of the averages, by decay ** period
    training.ema_sigma = ()  # sigma_rel of power-function averages, as 0.05,0.10 (post-hoc EMA)
    training.ema_snapshot_per_epoch = 5  # epochs between two snapshots of those, all of them kept
    training.half_precision = False  # matrix products of the network in bfloat16
    training.log_per_step = 100  # steps between two lines of metrics
    training.sample_on_training = True  # draw a grid of samples during training
    training.sample_per_epoch = 10  # epochs between two grids
    training.sample_steps = (1, 2, 4)  # of one noise, a row for each beside the grid; empty: none
    training.checkpoint_per_epoch = 10  # epochs between two checkpoints; the newest three are kept
    training.fid_per_epoch = 10  # epochs between two evaluations
    training.sample_per_step = 0  # steps between two grids; 0: sample_per_epoch decides
    training.checkpoint_per_step = 0  # steps between two checkpoints; 0: checkpoint_per_epoch
    training.fid_per_step = 0  # steps between two evaluations; 0: fid_per_epoch decides
    training.keep_best = ""  # metric (fid, ...) whose best checkpoint stays in WORKDIR/best
    training.wandb = ""  # project of Weights & Biases (needs pip install wandb); empty: not used
    training.profile_steps = ()  # (first, last) step of a profile, first > 1; empty: none


# Sampling -------------------------------------------------------------------------------------


def _sampling(sampling):
    sampling.seed = 0  # of the noise and the labels; sample i depends on the seed and i alone
    sampling.num_steps = (1,)  # network evaluations per image; several: evaluate each
    sampling.method = ("ode",)  # ode | consistency (average velocity) | euler | heun; several: each
    sampling.omega = ()  # guidance scales, for objectives guided at sampling time; several: each
    sampling.t_min = (0.0,)  # that guidance holds for t_min <= t <= t_max; several: each
    sampling.t_max = (1.0,)  # the end of that interval; several: each
    sampling.channels = 0  # it concerns the first so many channels; 0: all
    sampling.sampling_timesteps = ()  # explicit times 1 > ... > 0, instead of num_steps equal steps
    sampling.num_images = 64  # of a sampling job
    sampling.labels = ()  # classes of a sampling job, repeated in turn; empty: all classes
    sampling.format = "png"  # what a sampling job writes beside its grid: png | npz
    sampling.vae_dtype = "float32"  # of the decoder's products: float32 | bfloat16, which is faster


# Evaluation -----------------------------------------------------------------------------------


def _fid(fid):
    fid.on_training = True  # evaluate during training
    fid.num_samples = 50000  # generated images
    fid.device_batch_size = 20  # images per device at a time
    fid.cache_ref = ""  # npz with the reference mean and covariance; empty: the training images
    fid.evaluator = "meanflow"  # meanflow | adm | edm2: whose numbers; it sets what is empty below
    fid.resize = ""  # to 299x299: half_pixel (published numbers) | tf1 (ADM, NVIDIA)
    fid.labels = ""  # labels of the samples: random (all three) | balanced
    fid.rounding = ""  # of images to bytes: nearest (127.5 x + 128) | down (127.5 (x + 1), ADM)
    fid.metrics = ()  # fid, sfid, inception_score, precision_recall, fd_dinov2, kid, kid_all, mind
    fid.features = "inception"  # inception (FID) | pixels (Frechet distance of pixels in [0, 1])
    fid.inception_weights = ""  # weight file; empty: $INCEPTION_WEIGHTS, then the cache folder
    fid.dinov2_weights = ""  # weight file; empty: $DINOV2_WEIGHTS, then the cache folder
    fid.dinov2_resize = "edm2"  # to 224x224: edm2 | edm2_pil (dgm-eval) | torch_fidelity
    fid.weights = ("ema",)  # which weights: ema, ema_DECAY, ema_sigmaS (any profile), params


# Devices --------------------------------------------------------------------------------------


def _mesh(mesh):
    mesh.fsdp = 0  # devices over which weights, averages and optimizer are split; 0: as is best


# The job --------------------------------------------------------------------------------------


def _job(config):
    config.load_from = config_dict.placeholder(str)  # a run's workdir or a published checkpoint
    config.init_from = config_dict.placeholder(str)  # weights to begin a new run with, or a .pt
    config.init_weights = "ema"  # which of them: ema | params
    config.init_format = ""  # of a .pt file, which does not say it: sit | repa | dit
    config.eval_only = False  # evaluate load_from and stop
    config.sample_only = False  # draw sampling.num_images from load_from and stop
