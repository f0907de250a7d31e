"""What the commands do once their command lines are accepted: fastgrpo/train.py reads that of training, and so on.

These modules need torch, diffusers and the like, which take seconds to import. Whoever asks for --help, or mistypes a flag, does not
wait for them.
"""
