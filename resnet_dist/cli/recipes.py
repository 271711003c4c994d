"""`resnet-dist recipes`: list the named techniques, or print one."""

from collections.abc import Iterator
from dataclasses import dataclass

from resnet_dist.config.fields import option
from resnet_dist.config.recipes import headline, texts
from resnet_dist.runtime.wording import suggestion


@dataclass(frozen=True, kw_only=True)
class Config:
    """List the recipes, or print the TOML file of one."""

    name: str | None = option(None, positional=True)
    """The recipe to print."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if self.name is not None and self.name not in texts():
            yield f"there is no recipe '{self.name}'{suggestion(self.name, list(texts()))}"


def main(cfg: Config) -> int:
    """Print. Returns the exit code."""
    if cfg.name is None:
        width = max(map(len, texts()))
        for name in texts():
            print(f"{name:<{width}}  {headline(name)}")
        print("\nresnet-dist recipes NAME prints one; resnet-dist train DATA --recipe NAME uses it.")
    else:
        print(texts()[cfg.name], end="")
    return 0
