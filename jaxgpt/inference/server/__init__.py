"""The HTTP server: OpenAI's protocol and a page for people, in front of the decoding engine.

fields      fields of a request's body: types, ranges, errors that name the field
calls       bodies of requests to calls: prompts as tokens, and how they are continued
answers     pieces of text to the JSON of responses and of streamed chunks
worker      the one thread that runs the engine
client      the pieces on their way to one client
app         the routes
metrics     what Prometheus reads
serving     the process: socket, signals, graceful shutdown
"""
