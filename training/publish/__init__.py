"""Publishing: an adapter to the Hub and to ModelScope, the page as a Space. Nothing that holds a secret goes up."""
