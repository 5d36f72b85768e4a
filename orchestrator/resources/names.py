"""What names, labels and annotations may be: as strict as Kubernetes, since they become parts of keys and patterns."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NAME_PART = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LONGEST_SUBDOMAIN = 253
SHOWN_AT_MOST = 80
_LONGEST_NUMBER = 256
"""In bits."""
_ANNOTATIONS_AT_MOST = 256 * 1024
"""In bytes, keys and values together; Kubernetes' own limit."""


def shown(value: object) -> str:
    """Write a value from outside into a message, cut where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > _LONGEST_NUMBER:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write the largest ones in decimal
    if isinstance(value, dict | list | tuple | set):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= SHOWN_AT_MOST else f"{text[: SHOWN_AT_MOST - 1]}…"


def check_name(value: str) -> str:
    """Accept a DNS-1123 label only: names become parts of Redis keys and ACL patterns."""
    if not DNS_LABEL.fullmatch(value):
        raise ValueError(
            f"{shown(value)} is not a DNS label: lower-case letters, digits and '-', 1 to 63, no '-' at either end"
        )
    return value


def check_subdomain(value: str) -> str:
    """Accept a DNS-1123 subdomain, as names of cluster-wide things are."""
    if len(value) > _LONGEST_SUBDOMAIN or not _SUBDOMAIN.fullmatch(value):
        raise ValueError(f"{shown(value)} is not a DNS subdomain: lower-case letters, digits, '-' and '.', at most 253")
    return value


def check_label_key(value: str) -> str:
    """Accept a label's key: `name` or `prefix.example/name`."""
    prefix, separator, name = value.rpartition("/")
    is_prefixed = len(prefix) <= _LONGEST_SUBDOMAIN and _SUBDOMAIN.fullmatch(prefix)
    if not _NAME_PART.fullmatch(name) or (separator and not is_prefixed):
        raise ValueError(f"{shown(value)} is not a label key such as zone or example.com/zone")
    return value


def check_label_value(value: str) -> str:
    """Accept a label's value: at most 63 letters, digits, '-', '_', '.'; or empty."""
    if value and not _NAME_PART.fullmatch(value):
        raise ValueError(
            f"{shown(value)} is not a label value: at most 63 letters, digits, '-', '_', '.', a letter or digit at "
            "both ends"
        )
    return value


def check_text(value: str) -> str:
    """Accept text that can be written as UTF-8: JSON can say half of a surrogate pair, which no reader takes back."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{shown(value)} has half of a surrogate pair") from None
    return value


def _check_annotations(value: dict[str, str]) -> dict[str, str]:
    size = sum(len(key.encode()) + len(text.encode()) for key, text in value.items())
    if size > _ANNOTATIONS_AT_MOST:
        raise ValueError(f"are {size} bytes in all, and at most {_ANNOTATIONS_AT_MOST} are kept")
    return value


Name = Annotated[str, AfterValidator(check_name)]
LabelKey = Annotated[str, AfterValidator(check_label_key)]
LabelValue = Annotated[str, AfterValidator(check_label_value)]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=64)]
Subdomain = Annotated[str, AfterValidator(check_subdomain)]
Annotations = Annotated[dict[LabelKey, Annotated[str, AfterValidator(check_text)]], AfterValidator(_check_annotations)]
