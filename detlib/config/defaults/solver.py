"""Keys of the optimiser and its schedule: SOLVER. Iterations count optimiser steps from 0."""

SOLVER = {
    # Pictures in a batch, over all processes.
    "IMS_PER_BATCH": 16,
    # With N > 0 the config is meant for N processes: started with another number, batch, learning rate and
    # schedule are scaled to it (see DefaultTrainer.auto_scale_workers). 0: never.
    "REFERENCE_WORLD_SIZE": 0,
    "MAX_ITER": 40000,
    # With a number above 0, training takes that many passes over the training data: MAX_ITER is set from it,
    # and STEPS and WARMUP_ITERS are moved in proportion.
    "MAX_EPOCHS": 0.0,
    # Share each batch out over this many forward and backward passes before the one update, to save memory.
    # IMS_PER_BATCH counts the pictures of the update.
    "ACCUM_STEPS": 1,
    # A name of detlib.solver: WarmupMultiStepLR, WarmupCosineLR, WarmupStepWithFixedGammaLR.
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "BASE_LR": 0.001,
    # Where WarmupCosineLR ends.
    "BASE_LR_END": 0.0,
    # At these iterations the rate is multiplied by GAMMA (WarmupMultiStepLR).
    "STEPS": (30000,),
    "GAMMA": 0.1,
    # How often WarmupStepWithFixedGammaLR multiplies by GAMMA, evenly over the run.
    "NUM_DECAYS": 3,
    # The rate rises from BASE_LR * WARMUP_FACTOR within WARMUP_ITERS iterations: "linear", or "constant" and
    # then a jump.
    "WARMUP_FACTOR": 1.0 / 1000,
    "WARMUP_ITERS": 1000,
    "WARMUP_METHOD": "linear",
    # Whether the schedule's whole course is squeezed into what the warm-up leaves, or the warm-up covers its
    # start.
    "RESCALE_INTERVAL": False,
    # "SGD", with momentum, or "AdamW".
    "OPTIMIZER": "SGD",
    # AdamW's decay of the averages of the gradient and of its square.
    "BETAS": (0.9, 0.999),
    # Of stochastic gradient descent.
    "MOMENTUM": 0.9,
    "NESTEROV": False,
    # Weight decay in general, of normalisation layers, and of biases (None: as in general).
    "WEIGHT_DECAY": 0.0001,
    "WEIGHT_DECAY_NORM": 0.0,
    "WEIGHT_DECAY_BIAS": None,
    # Factor of the learning rate of biases.
    "BIAS_LR_FACTOR": 1.0,
    # Factors of the learning rate by parameter name, as [pattern, factor] with * and ?:
    # [["backbone.*", 0.1]]. The first pattern that fits counts.
    "LR_FACTORS": [],
    # Factor of the learning rate from one block of a plain ViT backbone to the one below it.
    "LAYER_DECAY": 1.0,
    # Gradients of each parameter: "value" cuts every element to +-CLIP_VALUE, "norm" scales the NORM_TYPE
    # norm down to it, "full_model" the norm of all parameters together.
    "CLIP_GRADIENTS": {
        "ENABLED": False,
        "CLIP_TYPE": "value",
        "CLIP_VALUE": 1.0,
        "NORM_TYPE": 2.0,
    },
    # Iterations between checkpoints; or epochs, passes over the training data, if that is above 0.
    "CHECKPOINT_PERIOD": 5000,
    "CHECKPOINT_EPOCHS": 0,
    # How many periodic checkpoints to keep, the newest ones; 0 keeps all.
    "CHECKPOINT_KEEP_LAST": 0,
    # Write checkpoints while training goes on, from a copy in main memory.
    "CHECKPOINT_ASYNC": False,
    # Keep the best checkpoint too, as model_best.pth, by a metric of the evaluation such as "bbox/AP"; "":
    # none. MODE says whether "max" or "min" is best.
    "BEST_CHECKPOINT": {"METRIC": "", "MODE": "max"},
    # End the training after PATIENCE evaluations in a row without a better METRIC ("": that of
    # BEST_CHECKPOINT); 0: never.
    "EARLY_STOP": {"PATIENCE": 0, "METRIC": "", "MODE": "max"},
    # Automatic mixed precision: "float16", whose gradients are scaled, or "bfloat16". On the CPU always
    # bfloat16.
    "AMP": {"ENABLED": False, "PRECISION": "float16"},
    # Exponential moving average of the weights. It is what evaluation uses, and is saved with the model.
    "EMA": {"ENABLED": False, "DECAY": 0.9998},
    # A loss that is infinite or NaN ends the training; with N > 0 its step is left out instead, up to N in a
    # row.
    "SKIP_NON_FINITE": 0,
}
