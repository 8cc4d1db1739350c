"""The base of every section of settings; it needs pydantic and nothing else."""

from pydantic import BaseModel, ConfigDict


class Closed(BaseModel):
    """A frozen set of keys: an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True)
