"""What the paper reports and these modules draw ours beside: its tasks, methods and Table 1.

Zhang et al., "GoRL: An Algorithm-Agnostic Framework for Online Reinforcement Learning with
Generative Policies" (2025).
"""

TASKS = ("CheetahRun", "FingerSpin", "FingerTurnHard", "FishSwim", "HopperStand", "WalkerWalk")

# Script -> the method's name, in the order of the paper's table.
METHODS = {
    "ppo_gaussian": "PPO",
    "fpo": "FPO",
    "dppo": "DPPO",
    "gorl_diff_ppo": "GoRL(DIFF)",
    "gorl_fm_ppo": "GoRL(FM)",
}
SEEDS = 5
TOTAL_TIMESTEPS = 180_000_000

# Table 1: final normalised return, mean and std over five seeds, a row a method, a column a task as
# in TASKS.
TABLE_1 = {
    "ppo_gaussian": [
        (724.83, 155.67),
        (539.03, 146.63),
        (738.70, 114.45),
        (433.70, 73.63),
        (286.09, 273.07),
        (825.65, 79.70),
    ],
    "fpo": [
        (599.15, 297.45),
        (56.05, 124.53),
        (752.08, 55.39),
        (204.66, 191.49),
        (3.94, 1.79),
        (29.00, 4.32),
    ],
    "dppo": [
        (559.79, 99.97),
        (694.06, 191.59),
        (633.84, 88.21),
        (143.52, 26.25),
        (2.14, 0.81),
        (345.59, 64.45),
    ],
    "gorl_diff_ppo": [
        (902.24, 2.20),
        (844.74, 59.43),
        (884.59, 26.95),
        (608.61, 22.07),
        (874.63, 38.79),
        (908.96, 30.45),
    ],
    "gorl_fm_ppo": [
        (883.40, 19.94),
        (903.92, 104.08),
        (860.83, 14.93),
        (641.01, 13.10),
        (733.66, 223.76),
        (919.61, 60.86),
    ],
}
BETAS = (0.0, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1)  # Figure 5's sweep, on CheetahRun
STAGE_TASKS = ("CheetahRun", "HopperStand")  # Figure 6's panels
ACTIONS_TASK = "HopperStand"  # Figure 7's task


def reported(name: str, task: str) -> tuple[float, float] | None:
    """Mean and std of Table 1, or None for a method or a task that is not in it."""
    stems = {name: stem for stem, name in METHODS.items()}
    return TABLE_1[stems[name]][TASKS.index(task)] if name in stems and task in TASKS else None
