"""What a machine costs an hour, and a run: an amount and its currency, which are never apart.

No price ships with halfbyte, since prices differ by seller, place and day: `Price.parse("0.34 EUR/h")` reads what the
user entered. Amounts of two currencies are not compared, because no exchange rate ships either: `one_currency` says so.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from halfbyte.errors import UsageError

_SYMBOLS = {"$": "USD", "€": "EUR", "£": "GBP"}
# ISO 4217's currencies in use: a typing error would otherwise be a currency of its own.
_ISO_4217 = """
    AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CLP
    CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR
    ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT
    MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD
    SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD UYU UZS VES VND
    VUV WST XAF XCD XOF XPF YER ZAR ZMW ZWG
"""
_CURRENCIES = frozenset(_ISO_4217.split())
_HOUR = {"", "/h", "/hr", "/hour", "perhour", "anhour"}
_EXAMPLE = "write an amount and its currency by the hour, as in 0.34 EUR/h"
_CURRENCY = r"([$€£]|[A-Za-z]{3}(?![A-Za-z]))?"
_PARTS = re.compile(rf"\s*{_CURRENCY}\s*(-?[0-9][0-9.,]*|-?\.[0-9]+)\s*{_CURRENCY}\s*(.*?)\s*")


@dataclass(frozen=True)
class Cost:
    """An amount of money: what a run costs."""

    amount: float
    currency: str

    def __str__(self) -> str:
        return f"{self.amount:.2f} {self.currency}"


@dataclass(frozen=True)
class Price:
    """An amount of `currency` (three letters, as ISO 4217 writes them) an hour."""

    amount: float
    currency: str

    @classmethod
    def parse(cls, text: str) -> "Price":
        """`0.34 EUR/h`, `2.5 USD`, `$2.50`, `EUR 0.34`. UsageError for anything else, a bare number above all."""
        found = _PARTS.fullmatch(str(text))
        if found is None:
            raise UsageError(f"price {str(text)!r} is not an amount of money: {_EXAMPLE}")
        before, digits, after, unit = found.groups(default="")
        if "".join(unit.lower().split()) not in _HOUR:
            raise UsageError(f"price {str(text)!r} is not by the hour ({unit!r}): {_EXAMPLE}")
        if not before and not after:
            raise UsageError(f"price {str(text)!r} has no currency: {_EXAMPLE}")
        if before and after:
            raise UsageError(f"price {str(text)!r} has two currencies: {_EXAMPLE}")
        written = before or after
        currency = _SYMBOLS.get(written, written.upper())
        if currency not in _CURRENCIES:
            raise UsageError(f"price {str(text)!r}: {currency} is not a currency: {_EXAMPLE}")
        try:
            amount = float(digits)
        except ValueError:
            raise UsageError(f"price {str(text)!r}: {digits} is not a number (a dot, no commas): {_EXAMPLE}") from None
        if amount < 0 or not math.isfinite(amount):
            raise UsageError(f"price {str(text)!r} is negative or infinite: {_EXAMPLE}")
        return cls(amount, currency)

    def of(self, seconds: float) -> Cost:
        """What so many seconds cost."""
        return Cost(self.amount * seconds / 3600, self.currency)

    def __str__(self) -> str:
        digits = f"{self.amount:.6f}".rstrip("0").rstrip(".")
        return f"{digits} {self.currency}/h"


def one_currency(prices: Iterable[tuple[str, Price | None]]) -> str | None:
    """The currency of all prices that there are; None without any. UsageError that names the two that differ.

    prices   (whose it is, the price), for the message
    """
    first: tuple[str, Price] | None = None
    for name, price in prices:
        if price is None:
            continue
        if first is None:
            first = name, price
        elif price.currency != first[1].currency:
            raise UsageError(
                f"prices in two currencies cannot be compared: {first[0]} costs {first[1]}, {name} {price}: "
                "enter both in one currency"
            )
    return None if first is None else first[1].currency
