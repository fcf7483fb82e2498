"""The files of a composition: written atomically, read strictly, told without loading a model."""
