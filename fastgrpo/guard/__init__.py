"""The guard: sees the policy's pictures lose their variety or no longer match their prompts, says so, and can act.

base.py        what the base model's own pictures of the positive prompts say of themselves
diversity.py   how far pictures are from each other
alarm.py       the rule: from these numbers to an alarm
control.py     the KL weight that follows a target, and what an alarm does to it and to the learning rate
watch.py       the one of a training, called once before and once after every iteration
"""
