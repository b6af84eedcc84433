"""The layout editor: a page in the browser, and the server that it talks to."""
