"""Types of the arrays that a denoiser takes and gives: shapes that tests check (jaxtyping).

B samples, T token frames, S tokens per frame, P values per token, L text tokens, D features.
"""

from collections.abc import Mapping

from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Num, Shaped

Tokens = Float[ArrayLike, "B T S P"]
PerSample = Num[ArrayLike, " B"]
Cond = Mapping[str, Shaped[ArrayLike, "B ..."] | None]
Sizes = Mapping[str, Num[ArrayLike, "B ..."]]
FrameMask = Bool[ArrayLike, "B T"]
Valid = Bool[ArrayLike, "B T S P"]
TokenValid = Bool[ArrayLike, "B T S"]
Features = Float[ArrayLike, "B T S D"]
Embedding = Float[ArrayLike, "B D"]
