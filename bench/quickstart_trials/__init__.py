"""Which images, captions and settings make the quickstart's style convincing?"""
