"""What an augmenting model understands inside a composition, and whether it has anything to say.

Everything is measured in bits per byte of the completions, so that models with different tokens can be compared. What a
model gets out of a prompt is its *gain*: bits per byte behind another row's prompt, minus bits per byte behind the
right one. What arrives of it is the composition's *pairing gain*: the same where its augmenting models alone read
another row's prompt.

``looking`` goes into one answer: where connections looked, how far gates were open, what was added, and what each
augmenting model was worth for each token.
"""

from calmlm.communication.findings import Communication, Listening
from calmlm.communication.hearing import listen, listen_to_file, tokenizers_of
from calmlm.communication.looking import look, look_into
from calmlm.communication.trace import Trace

__all__ = ["Communication", "Listening", "Trace", "listen", "listen_to_file", "look", "look_into", "tokenizers_of"]
