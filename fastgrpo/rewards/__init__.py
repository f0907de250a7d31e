"""Scoring images. From the settings to a number:

terms.py           which terms there are, and the exception for one that breaks
registry.py        from the settings to the reward: `load_reward`
weighted.py        the weighted sum of terms
steering.py        the steered CLIP reward, with anchors.py its phrases, axis.py what they do to prompts
built_in.py        the other built-in terms
plugins.py         functions of the user's own
encoder.py         the frozen open_clip models, shared_encoder.py what lets terms share them

Nothing is re-exported: settings are checked against terms.py and anchors.py before open_clip, seconds to import, is
needed.
"""
