"""What a consortium is, as its coordinator writes it down: a name, the server's address, the sites."""

import ipaddress
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from core.data.manifest import SITE_NAME

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST_NAME = re.compile(rf"({_LABEL}\.)*(?!\d+$){_LABEL}")


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _host(text: Any) -> Any:
    """A DNS name in small letters or an IP address, as the certificate will name it."""
    if not isinstance(text, str):
        raise ValueError("must be a host name or an IP address, in quotation marks where YAML reads it as something else")
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        name = text.lower()
        if len(name) > 253 or not _HOST_NAME.fullmatch(name):
            raise ValueError("must be a host name or an IP address") from None
        return name


Host = Annotated[str, BeforeValidator(_host)]
Port = Annotated[int, Field(ge=1, le=65_535)]


class Address(_Closed):
    """Where a server is dialled."""

    host: Host
    port: Port

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_name(self) -> bool:
        """Whether it is a DNS name, not an IP address."""
        return bool(_HOST_NAME.fullmatch(self.host))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can dial it."""
        return self.host == "localhost" if self.is_name else ipaddress.ip_address(self.host).is_loopback


def _address(value: Any) -> Any:
    if isinstance(value, Address):
        return value
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]+):(\d{1,5})", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("must be host:port, such as fl.example.org:443")
    return {"host": found[1], "port": int(found[2])}


def _site(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class SitePlan(_Closed):
    """One site, and where its private key is made: here, to travel with its kit, or at the site, which sends a request."""

    name: Annotated[str, Field(pattern=f"^{SITE_NAME}$")]
    key: Literal["coordinator", "site"] = "coordinator"


class Consortium(_Closed):
    """The coordinator's file.

    Attributes:
        consortium: Its name, also that of the folder with the kits.
        server: What the sites dial.
        server_addresses: Further names and addresses that the server's certificate is good for.
        control_port: Where the SuperLink listens, on the server's own loopback.
        sites: Who takes part.
    """

    consortium: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")]
    server: Annotated[Address, BeforeValidator(_address)]
    server_addresses: Annotated[list[Host], Field(default_factory=list)]
    control_port: Port = 8443
    sites: Annotated[list[Annotated[SitePlan, BeforeValidator(_site)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [site.name.lower() for site in self.sites]
        for site in self.sites:
            if names.count(site.name.lower()) > 1:
                raise ValueError(f"sites: each must have a name of its own, whatever its case, got {site.name!r} twice")
            if site.name.lower() == "server":
                raise ValueError(f"sites: a name must not be the server's, got {site.name!r}")
        if self.control_port == self.server.port and not self.server.is_loopback:
            raise ValueError(
                f"control_port must differ from the port of server (a proxy listens there), got {self.control_port} for both"
            )
        return self

    @property
    def hosts(self) -> list[str]:
        """All that the server's certificate names; the last two are for the server's own programs and its proxy."""
        return list(dict.fromkeys([self.server.host, *self.server_addresses, "localhost", "127.0.0.1"]))


class _OneOfEach(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML lets the last of two equal keys win; here the second one is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} given twice")
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def read_consortium(path: Path) -> Consortium:
    """The coordinator's file.

    Raises:
        ValueError: It cannot be read, or has a key or value that no consortium can have; one line.
    """
    try:
        plain = yaml.load(path.read_text(encoding="utf-8"), _OneOfEach)
    except OSError as error:
        raise ValueError(f"{path.name}: the file must be readable, got {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: the file must be YAML, got {' '.join(str(error).split())}.") from None
    try:
        return Consortium.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        what = first["msg"].removeprefix("Value error, ")
        given = "" if ", got " in what or first["type"] == "missing" else f", got {first['input']!r}"
        raise ValueError(f"{path.name}: {where}: {what}{given}.") from None
