"""Adapt one pretrained network to one task after another: small deltas behind learned gates, the base untouched.

python train_sequential.py                                          # the demo, two to four minutes on two CPU cores
python train_sequential.py --dataset datasets/cubs_cropped --model_type resnet50 --lam 0.1
"""

from taps.cli.main import run

if __name__ == "__main__":
    run("train")
