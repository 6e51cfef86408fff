"""Other ways to erase a concept, behind the contract of `cad.edits.Edit`.

One module, one configuration under conf/edit/ and one test row each; building on cad/ only.
"""
