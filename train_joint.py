"""Train one network for many tasks together: a shared base and, for each task, small deltas behind learned gates.

python train_joint.py                                    # the demo's six tasks; the base learns too
python train_joint.py --variant lite                     # first one network for all tasks, then one task after another
python train_joint.py --dataset datasets/DomainNet --model_type resnet34 --lam 1
"""

from taps.cli.main import run

if __name__ == "__main__":
    run("joint")
