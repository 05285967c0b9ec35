"""Types of arrays in the signatures of denoisers and formulations. Tests check their shapes (jaxtyping).

B samples, T latent frames, S tokens per frame, P values per token, L text tokens, D features. Formulations take tokens
`[B, T, S, P]` or latents `[B, T, H, W, C]`: `*S` stands for the axes in the middle.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Num, Shaped

if TYPE_CHECKING:
  from jax import Array as ArrayLike

  Cond = Mapping[str, Any]
else:  # functions also accept NumPy arrays and Python scalars. Models also accept None as the text mask
  from jax.typing import ArrayLike

  Cond = Mapping[str, Shaped[ArrayLike, "B ..."] | None]

PerSample = Num[ArrayLike, " B"]
Time = float | Num[ArrayLike, ""] | Num[ArrayLike, " B"]  # a timestep, or an index in a schedule
FrameMask = Bool[ArrayLike, "B T"]  # True = frame to generate
Tokens = Float[ArrayLike, "B T S P"]
Latents = Float[ArrayLike, "B T *S P"]  # or tokens
Valid = Bool[ArrayLike, "B T *S P"]  # False = padding
TokenValid = Bool[ArrayLike, "B T S"]
Features = Float[ArrayLike, "B T S D"]
Embedding = Float[ArrayLike, "B D"]
Sizes = Mapping[str, Num[ArrayLike, "B ..."]]
