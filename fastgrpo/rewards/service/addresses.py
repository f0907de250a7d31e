"""The servers that the settings name, and the token that they are shown. Nothing is asked of anybody here."""

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastgrpo.settings.schema import ServiceConfig
from fastgrpo.system.errors import ConfigError, require

_URLS = "reward.service.urls"
_ACCEPTED = "accepted is http://HOST:PORT or https://HOST:PORT, with or without a path"


@dataclass(frozen=True)
class Address:
    """Where a server is. url: as it is shown. path: begins with a slash unless it is empty, and ends with none."""

    url: str
    secure: bool
    host: str
    port: int
    path: str


def read_addresses(config: ServiceConfig) -> tuple[Address, ...]:
    """The servers' addresses. Raises ConfigError for none, for what is no address, and for one that is named twice."""
    if not config.urls:
        raise ConfigError(f"{_URLS} = []: a term service:NAME needs servers; {_ACCEPTED}.")
    found = tuple(_address(url) for url in config.urls)
    places = [(each.host, each.port, each.path) for each in found]
    for address, place in zip(found, places, strict=True):
        require(places.count(place) == 1, _URLS, address.url, "every server once")
    return found


def _address(url: str) -> Address:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError.of(_URLS, url, _ACCEPTED) from error
    if parts.username is not None or parts.password is not None:
        # The address would be written into the run's config.toml, and this sentence into a log.
        raise ConfigError(
            f"{_URLS}: an address with a user's name or password in it; accepted are addresses without, and the name "
            "of an environment variable that holds a token in reward.service.token."
        )
    plain = re.fullmatch(r"[!-~]+", url) and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ConfigError.of(_URLS, url, _ACCEPTED)
    secure = parts.scheme == "https"
    path = parts.path.rstrip("/")
    return Address(url.rstrip("/"), secure, parts.hostname, port or (443 if secure else 80), path)


def read_token(config: ServiceConfig) -> str:
    """The token that the environment variable of the settings holds; empty where they name none.

    Raises ConfigError, which shows neither the variable's name nor its value: one of them may be taken for the other.
    """
    if not config.token:
        return ""
    token = os.environ.get(config.token, "")
    if not token:
        raise ConfigError(
            "reward.service.token names an environment variable that is not set; accepted is the name of one that "
            "holds the token, not the token."
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(
            "reward.service.token: the environment variable holds what cannot be sent as a token; accepted are ASCII "
            "characters without a space or a line's end."
        )
    return token
