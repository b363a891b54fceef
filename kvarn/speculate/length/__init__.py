"""Length control: how many tokens are drafted for whom, none included."""
