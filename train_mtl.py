"""Learn which blocks of one network each of several tasks runs; train again under sampled policies; test.

python train_mtl.py                                              # AdaShare on Scenes: all phases, offline
python train_mtl.py --method dynashare                           # the same with gates for every sample
python train_mtl.py --method automtl                             # every layer shared, owned or skipped
python train_mtl.py --method sparse_delta --base_task semseg     # sub-tasks that change 2 % of a base task's weights
python train_mtl.py --benchmark nyuv2 --tasks semseg normals depth --phases policy
python train_mtl.py --benchmark nyuv2 --tasks semseg normals depth --phases retrain test --exp_ids 0 1 2
"""

from taps.cli.main import run

if __name__ == "__main__":
    run("mtl")
