"""Like deformable_detr_R_50_50ep.py, with each decoder layer refining the boxes of the previous one."""

from .deformable_detr_R_50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.with_box_refine = True

train.output_dir = "./output/deformable_detr_with_box_refinement_50ep"
