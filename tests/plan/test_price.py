"""Prices: every spelling that people use, one clear line for the rest, and no comparison across currencies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.plan.price import Cost, Price, one_currency


@pytest.mark.parametrize(
    ("text", "amount", "currency"),
    [
        ("0.34 EUR/h", 0.34, "EUR"),
        ("0.34EUR/h", 0.34, "EUR"),
        ("2.5 USD", 2.5, "USD"),
        ("$2.50", 2.5, "USD"),
        ("€0.20/h", 0.2, "EUR"),
        ("1 £ per hour", 1.0, "GBP"),
        ("EUR 0.34", 0.34, "EUR"),
        ("  3 chf / hr ", 3.0, "CHF"),
        (".5 USD/hour", 0.5, "USD"),
        ("0 EUR/h", 0.0, "EUR"),
    ],
)
def test_a_price_is_an_amount_and_its_currency(text: str, amount: float, currency: str) -> None:
    assert Price.parse(text) == Price(amount, currency)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.34", "no currency"),
        ("2", "no currency"),
        ("0.34/h", "no currency"),
        ("", "not an amount"),
        ("cheap", "not an amount"),
        ("EUR", "not an amount"),
        ("inf USD", "not an amount"),
        ("nan EUR", "not an amount"),
        ("-1 EUR/h", "negative"),
        ("1 USD EUR", "not by the hour"),
        ("$2 EUR", "two currencies"),
        ("5 EUR/month", "not by the hour"),
        ("5 EUR/s", "not by the hour"),
        ("0,34 EUR/h", "a dot, no commas"),
        ("1.000.000 EUR", "is not a number"),
        ("2.5 dollars", "not by the hour"),
        ("9" * 400 + " EUR", "infinite"),
        ("2 GPU/h", "GPU is not a currency"),
    ],
)
def test_anything_else_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        Price.parse(text)
    assert "0.34 EUR/h" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
def test_no_text_does_anything_else(text: str) -> None:
    try:
        price = Price.parse(text)
    except HalfbyteError:
        return
    assert price.amount >= 0
    assert Price.parse(str(price)).currency == price.currency


@given(st.floats(0, 1e6), st.sampled_from(["EUR", "USD", "JPY"]))
def test_what_is_printed_can_be_read_again(amount: float, currency: str) -> None:
    again = Price.parse(str(Price(amount, currency)))
    assert again.currency == currency
    assert again.amount == pytest.approx(amount, abs=1e-6)


def test_hours_cost_what_they_cost() -> None:
    assert Price(0.3, "EUR").of(5400) == Cost(pytest.approx(0.45), "EUR")
    assert str(Cost(1.005, "USD")) == "1.00 USD"


def test_two_currencies_are_never_compared() -> None:
    assert one_currency([("a", None), ("b", Price(1, "EUR")), ("c", Price(2, "EUR"))]) == "EUR"
    assert one_currency([("a", None)]) is None
    with pytest.raises(UsageError, match=r"a costs 1 EUR/h, b 2 USD/h"):
        one_currency([("a", Price(1, "EUR")), ("b", Price(2, "USD"))])
