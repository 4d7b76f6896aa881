"""The server: llama-cpp-python's requests and answers in OpenAI's form, over HTTP.

From llama_cpp come the requests' types (llama_cpp.server.types), the prompts of chats with tools and JSON,
and the answers themselves. Its llama_cpp.server.app is not used, because there

- a client that leaves an unstreamed answer has it computed to the end;
- errors in a streamed answer come after the status 200, as a broken connection and a traceback;
- the list of models waits until the answers before it are done;
- a slow reader of a stream keeps the model from everybody else;
- what an earlier request left in the cache is used although it was computed in other batches, so that
  what one client gets depends in the last bits on what others asked;
- a grammar that does not parse, is nested too deep or allows no token ends the process;
- every web page may use the server, whatever its origin.
"""
