"""What the page says and does around an engine: the conversation, the service, the tabs, the page's texts and looks."""
