"""Figures of the page for Prometheus: who waits, how soon she speaks, how replies end, what fails. Never a word."""

from prometheus_client import Counter, Gauge, Histogram, start_http_server

from chat.engine import Usage

VARIABLE = "METRICS"  # of the environment: PORT or ADDRESS:PORT; unset, no figures are served
SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)

waiting = Gauge("chat_waiting", "Visitors in the queue, not yet answered")
generating = Gauge("chat_generating", "Visitors being answered")
left = Counter("chat_left", "Visitors who left or pressed Stop before the end of a reply")
replies = Counter("chat_replies", "Replies given, by adapter and by why they ended", ["adapter", "finish_reason"])
tokens = Counter("chat_tokens", "Tokens of those replies", ["adapter"])
first_token = Histogram(
    "chat_first_token_seconds", "From asking the engine to its first token", ["adapter"], buckets=SECONDS
)
whole_reply = Histogram("chat_reply_seconds", "From asking the engine to its last token", ["adapter"], buckets=SECONDS)
errors = Counter("chat_errors", "Messages that got no whole reply, by kind", ["kind"])


def count(adapter: str, usage: Usage) -> None:
    """A reply that has ended. The engine knew its adapter: strangers cannot fill the table with names."""
    replies.labels(adapter, usage.finish_reason).inc()
    tokens.labels(adapter).inc(usage.tokens)
    first_token.labels(adapter).observe(usage.first_token)
    whole_reply.labels(adapter).observe(usage.seconds)


def serve(address: str) -> None:
    """Serve the figures at PORT or ADDRESS:PORT, apart from the page, which is public; a bare port is for this machine.

    Raises ValueError for an address that cannot be read, OSError when it is taken.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{VARIABLE} is {address!r}. Write a port, or ADDRESS:PORT.")
    start_http_server(int(port), host or "127.0.0.1")
