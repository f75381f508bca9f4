"""Short training runs for comparison, and an interrupted copy of one."""

import shutil

import torch

from detlib.engine import DefaultTrainer


def sample_repeatably(labels, num_samples, positive_fraction, bg_label):
    """Replace `subsample_labels` with sampling that depends on the labels of the image only."""
    generator = torch.Generator().manual_seed(11)
    positive = ((labels != -1) & (labels != bg_label)).nonzero().flatten()
    negative = (labels == bg_label).nonzero().flatten()
    num_pos = min(int(num_samples * positive_fraction), len(positive))
    num_neg = min(num_samples - num_pos, len(negative))
    return (
        positive[torch.randperm(len(positive), generator=generator)[:num_pos]],
        negative[torch.randperm(len(negative), generator=generator)[:num_neg]],
    )


def make_interrupted_run(uninterrupted: DefaultTrainer, folder, iteration: int) -> None:
    """Create the output folder of a run that stopped right after it wrote checkpoint `iteration`."""
    folder.mkdir()
    name = f"model_{iteration:07d}.pth"
    shutil.copy(f"{uninterrupted.output_dir}/{name}", folder / name)
    (folder / "last_checkpoint").write_text(name)


def train(cfg, resume: bool) -> DefaultTrainer:
    """Train to the end and return the trainer."""
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer
