"""Figures of the page for Prometheus: who waits, how soon she speaks, how replies end, what fails. Never a word."""

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from chat.engine import Cost

SETTING = "METRICS"  # PORT or ADDRESS:PORT; unset, no figures are served
SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)

waiting = Gauge("chat_waiting", "Visitors in the line, not yet answered")
speaking = Gauge("chat_speaking", "Visitors being answered")
left = Counter("chat_left", "Visitors who left or pressed Stop before the end of a reply")
replies = Counter("chat_replies", "Replies given, by adapter and by why they ended", ["adapter", "stopped"])
tokens = Counter("chat_tokens", "Tokens of those replies", ["adapter"])
first_token = Histogram(
    "chat_first_token_seconds", "From asking the engine to its first token", ["adapter"], buckets=SECONDS
)
whole_reply = Histogram("chat_reply_seconds", "From asking the engine to its last token", ["adapter"], buckets=SECONDS)
errors = Counter("chat_errors", "Messages that got no whole reply, by kind", ["kind"])


def count(adapter: str, cost: Cost | None) -> None:
    """A reply that has ended, if it has. The engine knew its adapter: strangers cannot fill the table with names."""
    if cost is None:
        return
    replies.labels(adapter, cost.stopped).inc()
    tokens.labels(adapter).inc(cost.tokens)
    first_token.labels(adapter).observe(cost.first_token)
    whole_reply.labels(adapter).observe(cost.seconds)


def fail(error: Exception) -> None:
    """A message that got no whole reply."""
    errors.labels(type(error).__name__).inc()


def serve(place: str) -> None:
    """Serve the figures at a port of their own, to this machine only unless an address is named: the page is public.

    Raises ValueError for a place that is none, OSError when it is taken.
    """
    address, _, port = place.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{SETTING} is {place!r}. Write a port, or ADDRESS:PORT.")
    start_http_server(int(port), address or "127.0.0.1")
