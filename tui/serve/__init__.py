"""`qchat serve`: the OpenAI and Anthropic interfaces over HTTP, on the engine process that the app uses."""
