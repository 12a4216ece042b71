"""The parts of train_smol_vision.py: pictures, what is asked and said about them, the examination."""
