"""Terms `service:NAME`: scores that servers elsewhere compute, asked for over HTTP (docs/reward-service.md).

addresses.py   what the settings say of the servers, checked without asking them
wire.py        the bytes that are sent, both ways; a server in Python may use it too
exchange.py    one request to one server, and what can go wrong with it
client.py      the queue of an iteration's requests, shared out among servers, tried again where one fails
"""
